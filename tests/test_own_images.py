"""People's own images through the verbs: few of them, tiny ones, one class, and classes of any name."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from marval.cli import main
from marval.data import ImageData
from marval.io.checkpoint import load_model, save_model
from marval.pipeline import Pipeline
from marval.presets import DistillConfig, TuneConfig
from marval.rewards import load_classifier
from marval.train.classifier import plan_steps, train_classifier
from tiny import tiny_config, tiny_model

FAST = ("--batch-size", 4, "--updates", 2, "--warmup", 1, "--decay", 1, "--no-autocast")


@pytest.fixture
def marval(tmp_path, monkeypatch, capsys):
    """Run a verb in an empty folder; gives what it printed, or the line that it refused with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments, refused=False):
        monkeypatch.setattr(sys, "argv", ["marval", *map(str, arguments)])
        capsys.readouterr()
        if not refused:
            main()
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr().err.strip()
        assert ended.value.code == 2
        assert len(said.splitlines()) == 1
        return said

    return run


def make(root, classes, count, size=(8, 8), grey=False):
    rng = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            array = rng.integers(0, 255, (size[1], size[0]) + (() if grey else (3,)), dtype=np.uint8)
            Image.fromarray(array).save(root / name / f"{i}.png")


def space_of(folder):
    return json.loads((folder / "model/config.json").read_text())["space"]


@pytest.mark.parametrize(("classes", "count"), [(["a"], 1), (["a", "b"], 1)])
def test_a_few_tiny_images_train_distil_and_sample(classes, count, marval, tmp_path):
    """8x8 pixels make 4 tokens, fewer than every default K."""
    make(tmp_path / "mine", classes, count)
    marval("train", "--data", "folder:mine", *FAST, "--out", "teacher")
    said = marval("distill", "teacher", *FAST, "--probe-samples", 4, "--probe-every", 1, "--out", "student")
    assert "teacher has 4 tokens: K is 4, not 8" in said
    assert ("one image has no Fréchet distance" in said) == (len(classes) * count == 1)
    assert load_model(tmp_path / "student/model")[1].iterations == 4
    marval("sample", "student", "--count", 2, "--out", "drawn")
    assert len(list((tmp_path / "drawn").iterdir())) == 3


def test_a_model_whose_default_k_is_more_than_its_tokens_draws(tmp_path):
    """Students of four tokens were once saved with K = 8."""
    config = tiny_config()
    config = type(config)(**{**vars(config), "iterations": 40})
    assert Pipeline(tiny_model(), config).sample([0]).shape == (1, 1, 8, 8)


def test_k_and_m_stay_within_the_tokens():
    assert DistillConfig().within(4).iterations == 4
    assert DistillConfig().within(49) == DistillConfig()
    tuned = TuneConfig(iterations=8, gradient_iterations=8).within(4)
    assert (tuned.iterations, tuned.gradient_iterations) == (4, 4)
    assert TuneConfig().within(49) == TuneConfig()


@pytest.mark.parametrize("side", [36, 47, 63])
def test_images_of_any_size_train(side, marval, tmp_path):
    make(tmp_path / "mine", ["a", "b"], 2, size=(side, side))
    marval("train", "--data", "folder:mine", "--batch-size", 2, "--updates", 1, "--no-autocast", "--out", "run")
    rows, columns = space_of(tmp_path / "run")["image_size"]
    assert rows == columns
    assert side - 8 < rows <= side


def test_the_size_can_be_said(marval, tmp_path):
    make(tmp_path / "mine", ["a", "b"], 2, size=(50, 40))
    train = ["train", "--data", "folder:mine", "--batch-size", 2, "--updates", 1, "--no-autocast", "--out", "run"]
    marval(*train, "--size", "48x24")
    assert space_of(tmp_path / "run")["image_size"] == [24, 48]
    marval("sample", "run", "--count", 1, "--out", "drawn", "--diffusion-steps", 2, "--iterations", 1)
    (file,) = (tmp_path / "drawn").glob("00000*")
    assert Image.open(file).size == (48, 24)
    assert "expected a --size such as 40x40" in marval(*train, "--out", "other", "--size", "37", refused=True)
    assert "--size 32: fashion-mnist has its own size" in marval("train", "--size", 32, refused=True)


def test_grey_images_train_a_grey_model_and_fit_a_colour_one(marval, tmp_path):
    make(tmp_path / "grey", ["a", "b"], 2, grey=True)
    make(tmp_path / "colour", ["a", "b"], 2)
    for data, channels in (("grey", 1), ("colour", 3)):
        marval("train", "--data", f"folder:{data}", *FAST, "--out", data + "-run")
        assert space_of(tmp_path / f"{data}-run")["channels"] == channels
    distill = ["distill", *FAST, "--probe-samples", 0, "--out", "student"]
    marval(*distill, "colour-run", "--data", "folder:grey")
    assert "the data's pixels are (3, 8, 8)" in marval(
        *distill, "grey-run", "--data", "folder:colour", "--out", "other", refused=True
    )


def test_a_classifier_of_few_images_takes_steps_and_says_how_many(marval, tmp_path):
    make(tmp_path / "mine", ["a", "b"], 71)  # 142: once 0 steps
    said = marval("train-classifier", "--data", "folder:mine", "--epochs", 2, "--out", "c.safetensors")
    assert "on 14 images that it was not trained on, after 32 steps with 8 of 128 images each" in said
    make(tmp_path / "five", ["a", "b"], 2)
    said = marval("train-classifier", "--data", "folder:five", "--epochs", 3, "--out", "d.safetensors")
    assert "on 2 images that it was not trained on, after 3 steps with 2 of 2 images each" in said
    assert load_classifier(tmp_path / "d.safetensors").class_names == ("a", "b")
    assert plan_steps(60_000, 4) == (128, 4 * 468)  # large sets as ever


def test_a_classifier_learns_from_a_hundred_images(tmp_path):
    labels = torch.arange(100) % 2
    images = torch.randint(0, 60, (100, 1, 12, 12), dtype=torch.uint8)
    images[labels == 1, :, 4:8, 4:8] += 190
    data = ImageData(images, labels, ("empty", "square"))
    for architecture in ("plain", "residual"):
        out = tmp_path / f"{architecture}.safetensors"
        assert train_classifier(architecture, data, data, out, epochs=4) > 0.9


def test_a_classifier_that_cannot_be_is_refused_before_anything_is_trained(marval, tmp_path):
    make(tmp_path / "one", ["a"], 4)
    make(tmp_path / "two", ["a", "b"], 1)
    verb = ["train-classifier", "--out", "c.safetensors"]
    assert "all images are of one class, 'a'" in marval(*verb, "--data", "folder:one", refused=True)
    assert "none can be held out" in marval(*verb, "--data", "folder:two", refused=True)
    assert "--epochs 0: expected a whole number from 1" in marval(
        *verb, "--data", "folder:two", "--epochs", 0, refused=True
    )
    (tmp_path / "file").write_text("x")
    for out, reason in (("two", "is a folder"), ("file/c.safetensors", "is a file, expected a folder")):
        assert reason in marval("train-classifier", "--data", "folder:two", "--out", out, refused=True)
    assert not list(tmp_path.glob("c.*"))


NAMES = ("cat", "cat, black", "black", "cat, black, old", "7", "1", "café", " spaced ", "a" * 200, "../up", "猫")


@pytest.fixture
def named(tmp_path):
    """A model with classes of any name."""
    config = tiny_config()
    mar = type(config.mar)(**{**vars(config.mar), "num_classes": len(NAMES)})
    config = type(config)(**{**vars(config), "mar": mar, "class_names": NAMES})
    from marval.model import MAR
    from marval.runtime.rng import generator

    model = MAR(mar).initialize(generator(0, "named")).eval().requires_grad_(False)
    save_model(tmp_path / "named", model, config)
    return Pipeline(model, config)


def test_every_class_can_be_asked_for_by_its_name(named):
    for label, name in enumerate(NAMES):
        assert named.labels([name]) == [label]
        assert named.listed_labels([name]) == [label]
        assert named.labels([label]) == [label]
    assert named.listed_labels(NAMES) == list(range(len(NAMES)))


def test_lists_with_commas_mean_what_they_say(named):
    def labels(*texts):
        return named.listed_labels(texts)

    assert labels("cat,7,café") == [0, 4, 6]
    assert labels("7, cat, black, 猫") == [4, 1, 10]  # the longest name
    assert labels("cat, black, old,cat") == [3, 0]
    assert labels("cat", "black") == [0, 2]  # the option twice
    assert labels("0, 3") == [0, 3]
    assert labels("1") == [5]  # a name goes before a number
    assert labels("cafe\u0301") == [6]  # as macOS writes it
    assert labels("spaced") == [7]
    with pytest.raises(ValueError, match=r"unknown class ' dog': expected a number from 0 to 10, or "):
        labels("cat, dog")
    with pytest.raises(ValueError, match="unknown class '11'"):
        labels("11")


def test_pictures_of_classes_of_any_name_are_saved(named, marval, tmp_path):
    marval("sample", "named", "--count", len(NAMES), "--iterations", 1, "--diffusion-steps", 2, "--out", "all")
    files = sorted(file.name for file in (tmp_path / "all").iterdir())
    assert len(files) == len(NAMES) + 1
    assert files[1] == "00001-cat,-black-1.png"
    assert files[8] == f"00008-{'a' * 40}-8.png"
    assert files[9] == "00009-..-up-9.png"
    draw = ["sample", "named", "--iterations", 1, "--diffusion-steps", 2, "--count", 2, "--out"]
    marval(*draw, "two", "--classes", "cat, black", "--classes", "7")
    marval(*draw, "comma", "--classes", "cat, black,7")
    for out in ("two", "comma"):
        assert sorted(file.name for file in (tmp_path / out).glob("0*")) == ["00000-cat,-black-0.png", "00001-7-1.png"]
