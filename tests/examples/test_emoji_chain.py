"""The emoji example: its README's commands are understood, and work on each other's results."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from marval.cli.options import read
from texts import write_captioned
from training import log_of

ROOT = Path(__file__).parents[2]
README = ROOT / "examples/emoji/README.md"
SCRIPTS = {"judge": "train", "score": "score", "train_teacher": "train", "train_vae": "train_vae"}  # their functions


@pytest.fixture
def script(monkeypatch):
    """Run a script of the examples in this process; its arguments are read alone where `only_read` is set."""
    for folder in ("examples", "examples/emoji"):
        monkeypatch.syspath_prepend(str(ROOT / folder))

    def run(name, *words, only_read=False):
        command = read(getattr(importlib.import_module(name), SCRIPTS[name]), [*map(str, words)], f"{name}.py")
        return None if only_read else command()

    yield run
    for name in SCRIPTS:
        sys.modules.pop(name, None)


def test_the_scripts_understand_every_command_of_the_readme(script):
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("python examples/")]
    assert {Path(file).stem for file, *_ in commands} == {*SCRIPTS, "make_dataset"}
    for file, *words in commands:
        assert (ROOT / file).is_file()
        if Path(file).stem in SCRIPTS:
            script(Path(file).stem, *words, only_read=True)


def test_drawings_become_a_tuned_student_of_latents_with_a_score(script, marval, encoder, monkeypatch, tmp_path):
    write_captioned(tmp_path / "drawings")
    data, few = "folder:drawings", ("--updates", 3, "--batch-size", 4, "--device", "cpu")
    sizes = ("--size", 8, "--stride", 2, "--channels", 4, "--width", 8)
    script("train_vae", data, "vae", *sizes, "--held-out", f"{data}@held-out", *few)
    marval("cache", "cache", "--images", "drawings", "--vae", "vae", "--image-size", 8, "--no-mirrors")
    small = ("--patch", 2, "--width", 16, "--depth", 1, "--heads", 2, "--head-width", 8, "--head-depth", 1)
    script("train_teacher", "latents:cache", *small, "--warmup", 1, "--decay", 1, *few, "--out", "teacher")
    for seed in (0, 1):
        judge = ("--epochs", 2, "--width", 4, "--device", "cpu", "--seed", seed, "--out", f"judge-{seed}.safetensors")
        script("judge", data, *judge)
    probe = ("--judge-data", data, "--probe-samples", 6)
    marval("distill", "teacher", "--warmup", 1, *few, *probe, "--name", "student", "--out", "student")
    monkeypatch.setenv("EMOJI_JUDGE", "judge-1.safetensors")
    held_out = f"{ROOT / 'examples/emoji/judge.py'}:Recognised"
    said = marval(
        "tune", "student", "--reward", "fd:efficientnet", "--held-out", held_out, "--moments-warmup", 1, *few, *probe,
        "--joint-draw", "--iterations", 4, 2, "--gradient-iterations", 2, "--out", "tuned",
    )  # fmt: skip
    assert "tuned/model: 3 of 3 updates done" in said.out
    assert {"fd", "held_out", "fd:efficientnet"} <= log_of(tmp_path / "tuned")[-1].keys()
    score = ("--data", data, "--images", 2, "--diffusion-steps", 9, "--device", "cpu", "--out", "r.json")
    script("score", "judge-0.safetensors", "teacher", "student", "tuned", *score)
    rows = json.loads((tmp_path / "r.json").read_text())["pairs"]["rows"]
    drawn = {row["model"]: row["draw"].get("diffusion_steps") for row in rows if row["iterations"]}
    assert drawn == {"emoji-teacher": 9, "student": None, "tuned": None}
    assert all(0 <= row["held_out_both"] <= row["held_out_concept"] <= 1 for row in rows)
