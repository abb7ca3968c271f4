"""People's own images through the verbs: the whole way once; few of them, tiny ones, and classes of any name."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

from marval.classes import listed_class_numbers
from marval.data import ImageData
from marval.io.checkpoint import load_model
from marval.model import MAR
from marval.pipeline import Pipeline
from marval.runtime.rng import generator
from marval.train.classifier import train_classifier
from pictures import make_pictures
from tiny import tiny_config

FAST = ("--batch-size", 4, "--updates", 2, "--warmup", 1, "--decay", 1, "--no-autocast")


def space_of(folder):
    return json.loads((folder / "model/config.json").read_text())["space"]


def test_the_whole_way_from_pictures_to_figures(marval, tmp_path):
    make_pictures(tmp_path / "mine", ("apple", "pear", "fig"), 8, (20, 18))
    marval("train", "--data", "folder:mine", *FAST, "--out", "runs/mine")
    config = json.loads((tmp_path / "runs/mine/model/config.json").read_text())
    assert config["class_names"] == ["apple", "fig", "pear"]
    assert (config["space"]["image_size"], config["space"]["channels"]) == ([16, 20], 3)
    marval("distill", "runs/mine", *FAST, "--probe-samples", 0, "--iterations", 2, "--out", "runs/student")
    for name, architecture in (("reward", "plain"), ("judge", "residual")):
        marval("train", "classifier", "--data", "folder:mine", "--architecture", architecture, "--epochs", 1,
               "--out", f"{name}.safetensors")  # fmt: skip
    marval("tune", "runs/student", "--reward", "classifier:reward.safetensors", "--judge", "judge.safetensors",
           "--updates", 2, "--iterations", 2, "--gradient-iterations", 2, "--batch-size", 3,
           "--probe-samples", 9)  # fmt: skip
    marval("sample", "runs/tuned", "--count", 2)
    assert len(list((tmp_path / "samples").iterdir())) == 3
    done = marval("evaluate", "runs/student", "runs/tuned", "--judge", "judge.safetensors", "--samples", 9,
                  "--iterations", 2, "--batches", 1, "--repeats", 1, "--budget", 60, "--plot", "plot.png")  # fmt: skip
    rows = json.loads((tmp_path / "results/evaluate.json").read_text())["quality"]["rows"]
    assert [row["model"] for row in rows] == ["student", "tuned"]
    assert all(row["fd"] > 0 and 0 <= row["accuracy"] <= 1 and row["gflops_per_image"] > 0 for row in rows)
    assert "FD-EfficientNet" in done.out
    assert "best within 60 s an image: " in done.out
    assert Image.open(tmp_path / "plot.png").width > 300
    said = marval("compare", "results/evaluate.json", "results/evaluate.json").out
    assert "figures: the same" in said


def test_one_tiny_image_trains_distils_and_is_drawn(marval, tmp_path):
    """8x8 pixels make 4 tokens, fewer than every default K."""
    make_pictures(tmp_path / "mine", ["a"], 1)
    marval("train", "--data", "folder:mine", *FAST, "--out", "teacher")
    marval("distill", "teacher", *FAST, "--probe-samples", 4, "--probe-every", 1, "--out", "student")
    assert load_model(tmp_path / "student/model")[1].iterations == 4
    marval("sample", "student", "--count", 2, "--out", "drawn")
    assert len(list((tmp_path / "drawn").iterdir())) == 3


def test_the_size_can_be_said(marval, refusal, tmp_path):
    make_pictures(tmp_path / "mine", ["a", "b"], 2, size=(50, 40))
    train = ["train", "--data", "folder:mine", "--batch-size", 2, "--updates", 1, "--no-autocast", "--out", "run"]
    marval(*train, "--size", "48x24")
    assert space_of(tmp_path / "run")["image_size"] == [24, 48]
    assert "expected a --size such as 40x40" in refusal(*train, "--out", "other", "--size", "37")


def test_grey_images_train_a_grey_model_and_fit_a_colour_one(marval, refusal, tmp_path):
    make_pictures(tmp_path / "grey", ["a", "b"], 2, grey=True)
    make_pictures(tmp_path / "colour", ["a", "b"], 2)
    for data, channels in (("grey", 1), ("colour", 3)):
        marval("train", "--data", f"folder:{data}", *FAST, "--out", data + "-run")
        assert space_of(tmp_path / f"{data}-run")["channels"] == channels
    distill = ["distill", *FAST, "--probe-samples", 0, "--out"]
    marval(*distill, "student", "colour-run", "--data", "folder:grey")
    said = refusal(*distill, "other", "grey-run", "--data", "folder:colour")
    assert "the data's pixels are (3, 8, 8)" in said


@pytest.mark.parametrize("architecture", ["plain", "residual"])
def test_a_classifier_learns_from_a_hundred_images(architecture, tmp_path):
    images, labels = torch.randint(0, 60, (100, 1, 12, 12), dtype=torch.uint8), torch.arange(100) % 2
    images[labels == 1, :, 4:8, 4:8] += 190
    data = ImageData(images, labels, ("empty", "square"))
    assert train_classifier(architecture, data, data, tmp_path / "c.safetensors", epochs=4) > 0.9


def test_a_classifier_that_cannot_be_is_refused_before_anything_is_trained(refusal, tmp_path):
    make_pictures(tmp_path / "one", ["a"], 4)
    make_pictures(tmp_path / "two", ["a", "b"], 1)
    for data, reason in (("one", "all images are of one class, 'a'"), ("two", "none can be held out")):
        assert reason in refusal("train", "classifier", "--out", "c.safetensors", "--data", f"folder:{data}")
    assert not list(tmp_path.glob("c.*"))


NAMES = ("cat", "cat, black", "7", "1", "café", " spaced ", "a" * 200, "../up", "猫")


@pytest.fixture
def named(tmp_path):
    """A model with classes of any name."""
    mar = dataclasses.replace(tiny_config().mar, num_classes=len(NAMES))
    model = MAR(mar).initialize(generator(0, "named")).eval().requires_grad_(False)
    pipeline = Pipeline(model, dataclasses.replace(tiny_config(), mar=mar, class_names=NAMES))
    pipeline.save(tmp_path / "named")
    return pipeline


@pytest.mark.parametrize(
    ("texts", "labels"),
    [
        (NAMES, list(range(len(NAMES)))),
        (["cat,7, 猫"], [0, 2, 8]),
        (["cat, black", "0, 5"], [1, 0, 5]),  # a name with a comma by itself
        (["1"], [3]),  # a name goes before a number
        (["cafe\u0301", "spaced"], [4, 5]),  # as macOS writes it
    ],
)
def test_every_class_can_be_asked_for_in_lists_with_commas(named, texts, labels):
    assert listed_class_numbers(texts, NAMES) == labels
    assert named.labels(labels) == labels


@pytest.mark.parametrize(("text", "wrong"), [("cat, dog", "' dog'"), ("11", "'11'")])
def test_unknown_classes_are_named(text, wrong):
    with pytest.raises(ValueError, match=rf"unknown class {wrong}: expected a number from 0 to 8, or "):
        listed_class_numbers([text], NAMES)


def test_pictures_of_classes_of_any_name_are_saved(named, marval, tmp_path):
    draw = ["sample", "named", "--iterations", 1, "--diffusion-steps", 2, "--count"]
    marval(*draw, len(NAMES), "--out", "all")
    files = sorted(file.name for file in (tmp_path / "all").iterdir())
    assert len(files) == len(NAMES) + 1
    assert files[1] == "00001-cat-black-1.png"
    assert files[6] == f"00006-{'a' * 40}-6.png"
    assert files[7] == "00007-..-up-7.png"
    marval(*draw, 2, "--out", "two", "--classes", "cat, black", "--classes", "7")
    assert sorted(file.name for file in (tmp_path / "two").glob("0*")) == ["00000-cat-black-0.png", "00001-7-1.png"]
