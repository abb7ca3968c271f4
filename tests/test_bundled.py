"""The models that ship with the package: small, documented, and good at what their cards say."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch

import marval
from marval.config import Chain, OneStep
from marval.data import FASHION_CLASSES
from marval.evaluate.draw import draw_bytes
from marval.rewards import load_classifier
from marval.train.classifier import classifier_accuracy

ASSETS = Path(str(files("marval"))) / "assets"
ROOT = Path(__file__).parents[1]
MODELS = ("fashion-teacher", "fashion-student", "fashion-tuned")


@pytest.mark.parametrize("name", MODELS)
def test_a_bundled_model_is_small_documented_and_loads(name):
    pipeline = marval.load(name)
    assert pipeline.config.name == name
    assert pipeline.config.class_names == FASHION_CLASSES
    assert pipeline.config.data == "fashion-mnist"
    draw = pipeline.config.draw
    assert isinstance(draw, Chain if name == "fashion-teacher" else OneStep)
    if isinstance(draw, OneStep):
        assert (draw.guidance, draw.guidance_schedule) == (1.6, "linear")  # the mean of 1.5, 1.8 and 1.5: see the card
    assert (ASSETS / name / "model.safetensors").stat().st_size <= 10e6
    assert (ROOT / "model_cards" / f"{name}.md").is_file()
    steps = [json.loads(line)["step"] for line in (ASSETS / name / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert len(steps) >= 5  # a tuning run may stop early


@pytest.mark.parametrize(("name", "accuracy"), [("fashion-student", 0.85), ("fashion-tuned", 0.85)])
def test_the_held_out_judge_recognises_what_students_draw(name, accuracy):
    images, labels = draw_bytes(marval.load(name), 200, 8, seed=1)
    judged = load_classifier("fashion-judge")(images.float() / 255).argmax(dim=1)
    assert (judged == labels).float().mean() >= accuracy


def test_the_teacher_draws_what_was_asked():
    images, labels = draw_bytes(marval.load("fashion-teacher").with_chain(diffusion_steps=25), 20, 8, seed=1)
    judged = load_classifier("fashion-judge")(images.float() / 255).argmax(dim=1)
    assert (judged == labels).float().mean() >= 0.75


@pytest.mark.parametrize("name", ["fashion-classifier", "fashion-judge"])
def test_the_classifiers_know_the_test_images(name, fashion_test):
    assert classifier_accuracy(load_classifier(name), fashion_test) > 0.91


def test_the_readme_in_five_lines():
    student = marval.load("fashion-student")
    images = student.sample(["sneaker", "bag"], seed=0, iterations=8)
    assert images.shape == (2, 1, 28, 28)
    assert torch.equal(images, student.sample(["sneaker", "bag"], seed=0, iterations=8))


@pytest.mark.parametrize("name", ["fashion-sweep.json", "fashion-reward.json"])
def test_the_page_shows_the_results_of_this_repository(name):
    """Copies: a Windows checkout would turn a symlink into a line of text."""
    assert not any(file.is_symlink() for file in ASSETS.rglob("*"))
    if not (ROOT / "results").is_dir():
        pytest.skip("no checkout: the results are not here to compare with")
    assert (ASSETS / name).read_bytes() == (ROOT / "results" / name).read_bytes(), "run make tables"
