"""`marval demo`: its report stands whatever follows, and it needs no data set and no network; whole, it is slow."""

import dataclasses
import importlib
import json
import shutil
import subprocess
import sys
from contextlib import nullcontext

import pytest
from PIL import Image

from marval.cli import main

demo = importlib.import_module("marval.cli.demo")  # the name itself is the verb
STUDENTS = (("fashion-student", 4), ("fashion-tuned", 2))


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A demo of seconds, on a machine without a network: `small("--out", ...)`."""

    def nowhere(*_, **__):
        raise AssertionError("the demo asked the network")

    monkeypatch.setattr("urllib.request.urlopen", nowhere)
    monkeypatch.setattr("marval.data.fashion.PACKAGE", tmp_path / "nothing")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "SAMPLES", 10)
    monkeypatch.setattr(demo, "REPEATS", 1)
    monkeypatch.setattr(demo, "DRAWN", STUDENTS)
    live = dataclasses.replace(demo.LIVE, updates=4, warmup=1, probe_every=2, batch_size=4, iterations=2)
    monkeypatch.setattr(demo, "LIVE", live)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["marval", "demo", "--device", "cpu", *map(str, arguments)])
        main()

    return run


def test_the_demo_draws_scores_and_distils_without_a_network(small, tmp_path, capsys):
    (tmp_path / "live").mkdir()  # the user's own
    (tmp_path / "live" / "mine").write_text("precious")
    small("--out", tmp_path)
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "demo.json").read_text())
    assert [(row["model"], row["iterations"]) for row in report["rows"]] == list(STUDENTS)
    assert (report["samples"], report["repeats"]) == (10, 1)
    for row in report["rows"]:
        assert 0 < row["seconds_in_batch"] < row["seconds_alone"]
        assert f"{row['accuracy']:.0%}" in said
    assert "fd" not in report["rows"][0]  # of so few images it would be nearly all bias
    assert "FD" not in said
    assert len(report["live_distillation"]) == 3  # before, in between, after
    for name in ("demo.png", "distillation.png"):
        assert Image.open(tmp_path / name).width > 300
        assert name in said
    assert (tmp_path / "live" / "mine").read_text() == "precious"
    command = said.rstrip().splitlines()[-1].partition(" serve ")[0].strip()
    assert shutil.which(command)  # also where the environment is not activated


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        (RuntimeError("the machine\nhas had enough"), "live distillation skipped: the machine has had enough\n"),
        (KeyboardInterrupt(), "marval: interrupted\n"),
    ],
)
def test_a_live_distillation_that_ends_early_costs_one_line(ending, said, small, tmp_path, monkeypatch, capsys):
    def ends(*_, **__):
        raise ending

    monkeypatch.setattr(demo, "distill", ends)
    with pytest.raises(SystemExit, match="130") if isinstance(ending, KeyboardInterrupt) else nullcontext():
        small("--out", tmp_path)
    assert "".join(capsys.readouterr()).count(said) == 1
    assert len(json.loads((tmp_path / "demo.json").read_text())["rows"]) == len(STUDENTS)
    assert Image.open(tmp_path / "demo.png").width > 300


def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_drawn(small, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(demo, "draw_models", None)
    with pytest.raises(SystemExit, match="2"):
        small("--out", tmp_path / "file")
    assert "file is a file, expected a folder; choose another place" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_demo(tmp_path):
    out = tmp_path / "demo"
    result = subprocess.run(
        [sys.executable, "-m", "marval", "demo", "--out", str(out)], capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((out / "demo.json").read_text())
    rows = {(row["model"], row["iterations"]): row for row in report["rows"]}
    teacher, student = rows["fashion-teacher", 16], rows["fashion-student", 4]
    assert teacher["seconds_alone"] > 20 * student["seconds_alone"]
    assert teacher["seconds_in_batch"] > 10 * student["seconds_in_batch"]
    accuracies = [row["accuracy"] for row in report["live_distillation"]]
    assert accuracies[-1] > accuracies[0] + 0.1
