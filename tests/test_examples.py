"""The examples and the sketches of CONTRIBUTING run as they stand."""

import re
import runpy
import subprocess
from pathlib import Path

import pytest
import torch

from marval.losses.gsim import squared

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def test_own_reward_says_what_it_gives_and_that_a_gradient_reaches_the_images(capsys):
    runpy.run_path(str(EXAMPLES / "own_reward.py"), run_name="__main__")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 11
    assert float(said[-1].split()[-1]) > 0


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.sh")), ids=lambda script: script.name)
def test_shell_examples_parse_and_ask_for_what_they_need(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    run = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert run.returncode != 0
    assert "line" in run.stderr


@pytest.fixture(scope="module")
def sketches():
    """What the Python blocks of CONTRIBUTING define, each run by itself."""
    found = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL):
        names = {}
        exec(compile(block, "CONTRIBUTING.md", "exec"), names)
        found |= names
    return found


def test_the_sketch_of_a_reward(sketches):
    images = torch.rand(3, 1, 8, 8, requires_grad=True)
    rewards = sketches["score"](images, ["a"] * 3)
    rewards.sum().backward()
    assert rewards.shape == (3,)
    assert images.grad.abs().sum() > 0


def test_the_sketch_of_an_order(sketches):
    assert sketches["column_order"]((2, 3), 0).tolist() == [0, 3, 1, 4, 2, 5]
    assert sketches["image"].shape == (1, 1, 28, 28)


def test_the_sketch_of_an_objective(sketches):
    teacher, auxiliary = torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 4.0], [1.0, 1.0]])
    assert sketches["fisher_loss"](teacher, auxiliary).tolist() == [25, 0]
    assert squared(teacher - auxiliary)[0].tolist() == [25, 0]


def test_the_sketch_of_a_data_set(sketches):
    data = sketches["load_stripes"]()
    assert data.shape == (1, 8, 8)
    assert data.class_names == ("vertical", "horizontal")
    assert data.images[0, 0, :, 0].tolist() == [0] * 8
    assert data.images[1, 0, 0, :].tolist() == [0] * 8
