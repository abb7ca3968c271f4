"""The judge of emoji: it learns concept and style, and its figures tell a picture of a pair from a copy of another."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from marval.cli.options import read
from marval.io.checkpoint import save_model
from marval.model import MAR
from marval.rewards import find_reward, label_prompts
from marval.runtime.rng import generator
from texts import text_config, write_captioned

FOLDER = Path(__file__).parents[2] / "examples/emoji"


@pytest.fixture
def scripts(monkeypatch):
    """The two scripts, which find each other as they lie in one folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("judge"), importlib.import_module("score")
    for name in ("judge", "score"):
        sys.modules.pop(name)


@pytest.fixture
def judge(scripts, encoder, monkeypatch, tmp_path):
    """A judge of six drawings, of which one is held out."""
    monkeypatch.chdir(tmp_path)
    write_captioned(tmp_path / "pictures")
    words = "folder:pictures --out judge.safetensors --epochs 150 --width 8 --device cpu"
    read(scripts[0].train, words.split(), "judge.py")()
    return scripts[0].load_judge(Path("judge.safetensors"))


def save_teacher():
    """Save an untrained teacher that draws such pictures, and knows which pair is held out."""
    config = text_config()
    space = dataclasses.replace(config.space, channels=3)
    mar = dataclasses.replace(config.mar, token_dim=space.token_dim)
    config = dataclasses.replace(config, mar=mar, space=space, unseen=(5,))
    save_model("words", MAR(mar).initialize(generator("judged")), config)


def test_it_tells_pictures_of_a_pair_from_copies_of_another(scripts, judge):
    drawings, figures_of = scripts[0].Drawings.read("folder:pictures"), scripts[1].figures_of
    assert drawings.seen.tolist() == [True] * 5 + [False]
    own, right = torch.arange(6), {"concept": 1.0, "style": 1.0, "both": 1.0}
    figures, nearest = figures_of(judge, drawings, drawings.images.flip(3), own)
    assert {name: figures[name] for name in right} == right
    assert (figures["own_distance"], figures["own_is_nearest"]) == (0, 1)
    assert nearest[:5].tolist() == own[:5].tolist()
    held_out, sibling = own[5:], drawings.images[4:5]  # the apple in flat style, and the one in 3-D style
    copied, nearest = figures_of(judge, drawings, sibling, held_out)
    assert (copied["concept"], copied["style"], copied["nearest_distance"], copied["own_is_nearest"]) == (1, 0, 0, 0)
    assert copied["own_distance"] > 0.1
    assert nearest.tolist() == [4]


def test_as_a_reward_it_prefers_what_a_prompt_asks_for(scripts, judge, monkeypatch):
    drawings, prompts = scripts[0].Drawings.read("folder:pictures"), label_prompts("{}", text_config())
    monkeypatch.setenv("EMOJI_JUDGE", "judge.safetensors")
    reward = find_reward(f"{FOLDER / 'judge.py'}:Recognised")
    images = drawings.images.requires_grad_()
    right, wrong = reward(images, prompts), reward(images, prompts[::-1])
    right.sum().backward()
    assert (right > 0.5).all()
    assert (wrong < 0.1).all()
    assert images.grad.abs().sum() > 0
    monkeypatch.setenv("EMOJI_JUDGE", "gone.safetensors")
    with pytest.raises(ValueError, match=r"gone.safetensors does not exist: make one with examples/emoji/judge.py"):
        find_reward(f"{FOLDER / 'judge.py'}:Recognised")


def test_it_scores_a_model_on_seen_and_held_out_pairs(scripts, judge):
    save_teacher()
    words = "judge.safetensors words --data folder:pictures --images 6 --diffusion-steps 2 --out r.json --sheets sheets"
    read(scripts[1].score, [*words.split(), "--device", "cpu"], "score.py")()
    drawn, decoded, copies, row = json.loads(Path("r.json").read_text())["pairs"]["rows"]
    assert (row["model"], row["samples"], row["draw"]["diffusion_steps"]) == ("text", 6, 2)
    assert (drawn["model"], decoded["model"]) == ("drawings", "drawings through the tokens of text")
    assert decoded["held_out_own_distance"] < 1e-3 < row["held_out_own_distance"]
    assert decoded["seen_both"] == 1.0
    assert (copies["held_out_concept"], copies["held_out_style"], copies["held_out_nearest_distance"]) == (1, 0, 0)
    assert Image.open("sheets/text.png").size[1] > 12 * 8
