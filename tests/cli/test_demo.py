"""`marval demo` needs no data set and no network; whole, it is slow."""

import dataclasses
import importlib
import json
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

demo = importlib.import_module("marval.cli.demo")  # the name itself is the verb
STUDENTS = (("fashion-student", 4), ("fashion-tuned", 2))
SMALL = {"SAMPLES": 10, "REPEATS": 1, "DRAWN": STUDENTS, "SUGGESTED": ("taxi", "shark"), "EMOJI": ("emoji-student",)}


def test_the_demo_draws_scores_and_distils_without_a_network(marval, tmp_path, monkeypatch):
    def nowhere(*_, **__):
        raise AssertionError("the demo asked the network")

    monkeypatch.setattr("urllib.request.urlopen", nowhere)
    monkeypatch.setattr("marval.data.fashion.PACKAGE", tmp_path / "nothing")
    live = dataclasses.replace(demo.LIVE, updates=4, warmup=1, probe_every=2, batch_size=4, iterations=2)
    for name, value in {**SMALL, "LIVE": live}.items():
        monkeypatch.setattr(demo, name, value)
    said = marval("demo", "--device", "cpu", "--out", tmp_path).out
    report = json.loads((tmp_path / "demo.json").read_text())
    assert [(row["model"], row["iterations"]) for row in report["rows"]] == list(STUDENTS)
    for row in report["rows"]:
        assert 0 < row["seconds_in_batch"] < row["seconds_alone"]
        assert f"{row['accuracy']:.0%}" in said
    assert [(row["model"], row["iterations"]) for row in report["emoji"]] == [("emoji-student", 4)]
    assert len(report["live_distillation"]) == 3  # before, in between, after
    for name, width in (("emoji.png", 200), ("demo.png", 300), ("distillation.png", 300)):
        assert Image.open(tmp_path / name).width > width
        assert name in said
    command = said.rstrip().splitlines()[-1].partition(" serve ")[0].strip()
    assert shutil.which(command)  # also where the environment is not activated


@pytest.mark.parametrize(("longest", "draws"), [(0.0, 1), (float("inf"), 1 + (1 + 2))])
def test_a_batch_that_takes_long_is_drawn_once(monkeypatch, longest, draws):
    monkeypatch.setattr(demo, "LONG", longest)
    monkeypatch.setattr(demo, "REPEATS", 2)
    monkeypatch.setattr("marval.evaluate.speed.SHORTEST", 0.0)
    drawn = []
    alone, batch, last = demo.time_drawing(lambda: None, lambda: drawn.append(1) or len(drawn), torch.device("cpu"))
    assert (len(drawn), last) == (draws, draws)
    assert min(alone, batch) > 0


def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_drawn(refusal, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(demo, "draw_models", None)
    assert "Not a directory; choose another place" in refusal("demo", "--out", "file")


@pytest.mark.slow
def test_the_whole_demo(tmp_path):
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "marval", "demo", "--out", str(out)]
    subprocess.run(command, capture_output=True, text=True, timeout=900, check=True)
    report = json.loads((out / "demo.json").read_text())
    rows = {(row["model"], row["iterations"]): row for row in report["rows"]}
    teacher, student = rows["fashion-teacher", 16], rows["fashion-student", 4]
    assert teacher["seconds_alone"] > 20 * student["seconds_alone"]
    assert teacher["seconds_in_batch"] > 10 * student["seconds_in_batch"]
    teacher, student, tuned = report["emoji"]
    assert teacher["seconds_alone"] > 5 * max(student["seconds_alone"], tuned["seconds_alone"])
    accuracies = [row["accuracy"] for row in report["live_distillation"]]
    assert accuracies[-1] > accuracies[0] + 0.1
