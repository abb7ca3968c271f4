"""The examples and the sketches of CONTRIBUTING run as they stand, and marval understands every command we print."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from marval.cli import VERBS
from marval.cli.options import options_of, read

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *EXAMPLES.glob("*/*.md")]


def printed_commands():
    """The arguments of every `marval` in the shell blocks of the documents."""
    for document in DOCUMENTS:
        for block in re.findall(r"```bash\n(.*?)```", document.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if "marval" in words and words[:1] != ["pip"]:
                    yield pytest.param(words[words.index("marval") + 1 :], id=f"{document.name}: {' '.join(words)}")


@pytest.mark.parametrize("words", printed_commands())
def test_marval_understands_every_command_that_we_print(words):
    count = 2 if " ".join(words[:2]) in VERBS else 1
    read(VERBS[" ".join(words[:count])], words[count:], "marval")


def test_the_pages_name_no_option_that_is_gone():
    known = {option.flag for verb in VERBS.values() for option in options_of(verb)}
    others = {"--check", "--dry-run", "--index-url", "--no-deps", "--steps"}  # of ruff, pip and tools; old commands
    others |= {"--channels", "--minutes", "--stride", "--parts", "--sizes", "--tflops"}  # train_vae, gpu_check, plan
    others |= {"--sheets", "--patch", "--prefixes", "--groups", "--own"}  # of the emoji's scripts, contexts
    for document in ROOT.glob("docs/*.md"):
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+(?![\w-])", document.read_text())) - others
        assert {flag for flag in named if flag not in known and flag.replace("--no-", "--") not in known} == set()


def test_quickstart_saves_a_picture_for_each_class_and_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "quickstart.py"))
    assert len(list(tmp_path.glob("*.png"))) == 20
    assert Image.open(tmp_path / "fashion-student-bag.png").size == (28, 28)
    assert "fashion-student: 10 pictures in" in capsys.readouterr().out


def test_own_reward_says_what_it_gives_and_that_a_gradient_reaches_the_images(capsys):
    runpy.run_path(str(EXAMPLES / "own_reward.py"), run_name="__main__")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 11
    assert float(said[-1].split()[-1]) > 0


def test_the_api_pages_training_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/api.md").read_text(), re.DOTALL)
    exec(code.replace("updates=3000", "updates=2, warmup=1, batch_size=2"), names := {})
    assert names["student"].config.name == "student"


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.sh")), ids=lambda script: script.name)
def test_shell_examples_parse_and_ask_for_what_they_need(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    run = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert run.returncode != 0
    assert {"own_images.sh": "name the folder of images", "imagenet_8gpu.sh": "kl16.ckpt"}[script.name] in run.stderr


def test_the_sketches_of_contributing():
    sketches = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL):
        exec(compile(block, "CONTRIBUTING.md", "exec"), names := {})
        sketches |= names
    images = torch.rand(3, 1, 8, 8, requires_grad=True)
    rewards = sketches["score"](images, ["a"] * 3)
    rewards.sum().backward()
    assert rewards.shape == (3,)
    assert images.grad.abs().sum() > 0
    assert sketches["column_order"]((2, 3), 0).tolist() == [0, 3, 1, 4, 2, 5]
    assert sketches["image"].shape == (1, 1, 28, 28)
    y = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    distance, gradient = sketches["cauchy"](y)
    assert torch.allclose(torch.autograd.grad(distance.sum(), y)[0], gradient)
    teacher_eps, phi_eps, eps = torch.randn(3, 5, 3)
    assert sketches["cauchy_loss"](teacher_eps, phi_eps, eps).shape == (5,)
    data = sketches["load_stripes"]()
    assert (data.shape, data.class_names) == ((1, 8, 8), ("vertical", "horizontal"))
    assert data.images[0, 0, :, 0].tolist() == data.images[1, 0, 0, :].tolist() == [0] * 8
