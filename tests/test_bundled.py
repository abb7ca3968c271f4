"""The models that ship with the package: small, documented, and good at what their cards say."""

import json
import re
from importlib.resources import files
from pathlib import Path

import pytest

import marval
from marval.config import Chain, OneStep
from marval.data import FASHION_CLASSES
from marval.evaluate.draw import draw_bytes
from marval.rewards import load_classifier
from marval.train.classifier import classifier_accuracy

ASSETS = Path(str(files("marval"))) / "assets"
ROOT = Path(__file__).parents[1]
MODELS = ("fashion-teacher", "fashion-student", "fashion-tuned")
EMOJI = ("emoji-teacher", "emoji-student", "emoji-tuned")


@pytest.mark.parametrize("name", MODELS)
def test_a_bundled_model_is_small_documented_and_loads(name):
    pipeline = marval.load(name)
    assert pipeline.config.name == name
    assert pipeline.config.class_names == FASHION_CLASSES
    assert pipeline.config.data == "fashion-mnist"
    draw = pipeline.config.draw
    assert isinstance(draw, Chain if name == "fashion-teacher" else OneStep)
    if isinstance(draw, OneStep):
        assert "guidance" in pipeline.config.dials
        assert pipeline.config.mar.joint_draw
    assert not re.search(r"(^|[\s=:])[/~]", pipeline.config.source)  # commands that anybody can type: no absolute path
    assert (ASSETS / name / "model.safetensors").stat().st_size <= 10e6
    assert (ROOT / "model_cards" / f"{name}.md").is_file()
    logged = [json.loads(line) for line in (ASSETS / name / "log.jsonl").read_text().splitlines()]
    updates = [line.get("update", line.get("step")) for line in logged]  # "step": of older runs
    assert updates == sorted(updates)
    assert len(updates) >= 5  # a tuning run may stop early


@pytest.mark.parametrize("name", EMOJI)
def test_a_bundled_model_of_emoji_is_small_documented_and_draws_what_it_knows(name, no_encoder):
    pipeline = marval.load(name)
    config = pipeline.config
    assert (config.name, config.styles, config.space.vae) == (name, ("3d", "cartoon", "flat"), "emoji-vae")
    assert len(config.class_names) == 1207
    made_by = {"teacher": "python examples/emoji/train_teacher.py", "student": "marval distill", "tuned": "marval tune"}
    assert config.source.startswith(made_by[name.removeprefix("emoji-")])
    assert not re.search(r"(^|[\s=:])[/~]", config.source)
    assert isinstance(config.draw, Chain if name == "emoji-teacher" else OneStep)
    assert config.data == "latents:cache/emoji"  # which the example's README makes
    files = [ASSETS / name / "model.safetensors", *(ASSETS / "emoji-vae").glob("*.safetensors")]
    assert sum(file.stat().st_size for file in files) <= 16 * 2**20
    assert "Fluent Emoji" in (ROOT / "model_cards" / f"{name}.md").read_text()  # the notices of its licences
    notices = (ROOT / "examples/emoji/LICENSES.md").read_text()
    assert (ASSETS / "emoji-vae/LICENSES.md").read_text() == notices  # they go where the models go
    updates = [json.loads(line)["update"] for line in (ASSETS / name / "log.jsonl").read_text().splitlines()]
    assert updates == sorted(updates)
    assert len(updates) >= 5
    red, blue = pipeline.sample(["a red heart, flat", "blue heart, flat style"], iterations=2)
    assert red.shape == (3, 32, 32)
    assert (red[0] - red[2]).mean() > 0.1 > (blue[0] - blue[2]).mean()


@pytest.mark.parametrize(
    ("name", "count", "accuracy"),
    [("fashion-student", 200, 0.95), ("fashion-tuned", 200, 0.95), ("fashion-teacher", 40, 0.85)],
)
def test_the_held_out_judge_recognises_what_models_draw(name, count, accuracy):
    model = marval.load(name)
    if isinstance(model.config.draw, Chain):
        model = model.with_draw(diffusion_steps=25)
    images, labels = draw_bytes(model, count, 8, seed=1)
    judged = load_classifier("fashion-judge")(images.float() / 255).argmax(dim=1)
    assert (judged == labels).float().mean() >= accuracy


@pytest.mark.parametrize("name", ["fashion-classifier", "fashion-judge"])
def test_the_classifiers_know_the_test_images(name, fashion_test):
    assert classifier_accuracy(load_classifier(name), fashion_test) > 0.91
