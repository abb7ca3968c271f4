"""Train the head of the text-image reward; report its retrieval accuracy with phrases, or images, that it never saw.

python tools/text_image.py --out runs/text-image.safetensors
python tools/text_image.py --data folder:my-images --phrases my-phrases.json --out runs/mine.safetensors
python tools/text_image.py --data folder:my-captioned-images --out runs/words.safetensors --report results/words.json
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from marval.cli.options import run_script
from marval.data import ImageData, batch_indices, load_images, split_data
from marval.io.files import check_output, write_text
from marval.io.text import ENCODER, load_encoder
from marval.rewards.efficientnet import FEATURES, EfficientNetFeatures
from marval.rewards.text_image import SENTENCES, TextImageHead
from marval.rewards.weights import save_described
from marval.runtime.provenance import made_by
from marval.runtime.rng import generator
from marval.train.classifier import descend

TEMPLATES = ("{}", "a photo of {}", "a picture of {}", "a high-quality and harmonious picture of {}")
TEMPERATURE = 0.07
DROPOUT = 0.8  # of captioned images: with one image of a pair, a head has more weights than it needs to know them all


@dataclass(frozen=True)
class Phrases:
    """For every class, phrases to learn and phrases that are held out."""

    learned: tuple[tuple[str, ...], ...]
    held_out: tuple[tuple[str, ...], ...]

    @classmethod
    def read(cls, file: Path | None, class_names: Sequence[str]) -> "Phrases":
        """Read {"class": {"learned": [...], "held_out": [...]}}; Fashion-MNIST's, beside this file, when None.

        The class's name is learned too, and in each template of `TEMPLATES`.

        Raises:
            ValueError: not such a file, other classes, none held out, or one that is learned and held out.
        """
        file = file or Path(__file__).with_name("fashion-phrases.json")
        try:
            said: Mapping[str, Mapping[str, list[str]]] = json.loads(file.read_text())
            if set(said) != set(class_names):
                raise ValueError(f"has phrases for {', '.join(said)}; the classes are {', '.join(class_names)}")
            learned = tuple((name, *said[name]["learned"]) for name in class_names)
            held_out = tuple(tuple(said[name]["held_out"]) for name in class_names)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} cannot be read as phrases: {error}") from error
        seen = {phrase.lower() for phrases in learned for phrase in phrases}
        for phrases in held_out:
            if not phrases or any(phrase.lower() in seen for phrase in phrases):
                raise ValueError(f"{file}: every class needs held-out phrases that are not learned")
        return cls(learned, held_out)


def train_head(
    features: Float[Tensor, "n f"],
    labels: Int[Tensor, " n"],
    texts: Sequence[Float[Tensor, "_ t"]],
    *,
    steps: int,
    batch_size: int = 256,
    seed: int = 0,
    dropout: float = 0.0,
) -> TextImageHead:
    """Train a head on image features and, for each class, sentence embeddings of its phrases.

    Each step takes a batch of images and one phrase of each class; the loss is the cross-entropy of the image's class
    among them. `dropout` is the share of an image's features that a step does not see.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "text-image").initial_seed())
        head = TextImageHead().to(features.device)
    head.mean.copy_(features.mean(dim=0))
    head.std.copy_(features.std(dim=0).clamp(min=1e-6))
    phrases, counts = torch.cat([*texts]), torch.tensor([len(of_class) for of_class in texts])
    starts = counts.cumsum(0) - counts
    for step in descend(torch.optim.AdamW(head.parameters(), 1e-3, weight_decay=0.1), steps):
        rng = generator(seed, "step", step)
        rows = batch_indices(len(features), min(batch_size, len(features)), step, seed).to(features.device)
        chosen = phrases[(starts + (torch.rand(len(counts), generator=rng) * counts).long()).to(phrases.device)]
        given = features[rows]
        if dropout:
            kept = torch.rand(given.shape, generator=rng).to(given) >= dropout
            given = head.mean + (given - head.mean) * kept / (1 - dropout)
        logits = head.embed_images(given) @ head.embed_texts(chosen).T / TEMPERATURE
        F.cross_entropy(logits, labels[rows]).backward()
    return head.eval()


@torch.no_grad()
def image_features(network: EfficientNetFeatures, data: ImageData, device: torch.device | str) -> Float[Tensor, "n f"]:
    """Features of images, 250 at a time."""
    return torch.cat([network(part.to(device)) for part in data.images.split(250)])


@torch.no_grad()
def retrieval(
    head: TextImageHead,
    features: Float[Tensor, "n f"],
    labels: Int[Tensor, " n"],
    texts: Sequence[Float[Tensor, "_ t"]],
    best: int = 50,
) -> dict[str, float | int]:
    """Retrieval accuracy with the phrases `texts` of every class.

    `image_to_text`: the share of images whose class's phrase fits best, among one phrase of each class, averaged over
    the phrases. `text_to_image`: the share of a phrase's `best` images that are of its class; `text_to_class`: the
    share of phrases that fit the images of their own class best, on average.
    """
    images = head.embed_images(features)
    scores = [images @ head.embed_texts(of_class).T for of_class in texts]
    rounds = min(score.shape[1] for score in scores)
    right = [
        (torch.stack([score[:, i] for score in scores], dim=1).argmax(dim=1) == labels).float().mean()
        for i in range(rounds)
    ]
    precision, own = [], []
    for label, score in enumerate(scores):
        top = score.topk(min(best, len(score)), dim=0).indices
        precision.append((labels[top] == label).float().mean(dim=0))
        means = torch.stack([score[labels == other].mean(dim=0) for other in range(len(scores))])
        own.append((means.argmax(dim=0) == label).float())
    return {
        "phrases": sum(score.shape[1] for score in scores),
        "image_to_text": float(torch.stack(right).mean()),
        "text_to_image": float(torch.cat(precision).mean()),
        "text_to_class": float(torch.cat(own).mean()),
        "chance": 1 / len(scores),
    }


def pairs_of(data: ImageData) -> tuple[Int[Tensor, " n"], list[str], list[list[str]]]:
    """Number the concepts of captioned images in every style: each image's pair, the pairs' names and their phrases.

    The phrases of a pair are the captions of all images of its concept, with its style.
    """
    said = data.captions
    assert said is not None
    styles = said.styles or ("",)
    ends = [f", {style} style" if style else "" for style in styles]
    phrases: list[dict[str, None]] = [{name: None} for name in data.class_names]
    for label, first, last in zip(data.labels.tolist(), said.starts[:-1], said.starts[1:], strict=True):
        phrases[label] |= dict.fromkeys(said.texts[row] for row in said.rows[first:last])
    names = [f"{name}{end}" for name in data.class_names for end in ends]
    return (
        data.labels * len(styles) + said.style.clamp(min=0),
        names,
        [[f"{phrase}{end}" for phrase in each] for each in phrases for end in ends],
    )


@torch.no_grad()
def found(
    head: TextImageHead,
    features: Float[Tensor, "n f"],
    pairs: Int[Tensor, " n"],
    names: Float[Tensor, "p t"],
    styles: int,
) -> dict[str, float]:
    """The share of images whose pair of concept and style, concept, and style are in the name that fits best of all."""
    best = (head.embed_images(features) @ head.embed_texts(names).T).argmax(dim=1)
    concept, style = best // styles == pairs // styles, best % styles == pairs % styles
    shares = {"pair": concept & style, "concept": concept, "style": style}
    return {name: float(right.float().mean()) for name, right in shares.items()} | {"chance": 1 / len(names)}


def train_on_captions(
    data: str, train: ImageData, steps: int, seed: int, device: str
) -> tuple[TextImageHead, dict[str, Any]]:
    """Train a head on captioned images; figures of them and of the held-out ones, which share concepts and styles."""
    _, channels, *size = train.images.shape
    test = load_images(f"{data}@held-out", size=(size[0], size[1]), channels=channels, encoder=ENCODER)
    network, encode = EfficientNetFeatures().to(device), load_encoder(ENCODER, device)
    pairs, names, phrases = pairs_of(train)
    seen, labels = pairs.unique(
        return_inverse=True
    )  # a pair without images would be learned as one that is never right
    texts = [encode(phrases[pair]) for pair in seen.tolist()]
    features = image_features(network, train, device)
    head = train_head(features, labels.to(device), texts, steps=steps, seed=seed, dropout=DROPOUT)
    named, styles = encode(names), max(1, len(train.captions.styles)) if train.captions else 1
    tested = image_features(network, test, device)
    return head, {
        "held_out": found(head, tested, pairs_of(test)[0].to(device), named, styles),
        "learned": found(head, features, pairs.to(device), named, styles),
        "images": len(train), "test_images": len(test),
    }  # fmt: skip


def train_on_phrases(
    data: str, train: ImageData, said: Phrases, images: int, steps: int, seed: int, device: str
) -> tuple[TextImageHead, dict[str, Any]]:
    """Train a head on images of classes and phrases for them; figures of test images with learned and held-out ones."""
    if data.startswith("fashion-mnist"):
        test = load_images(data, split="test")
    else:
        train, test = split_data(train, seed)
    rows = torch.randperm(len(train), generator=generator(seed, "images"))[:images]
    train = ImageData(train.images[rows], train.labels[rows], train.class_names)
    network, encode = EfficientNetFeatures().to(device), load_encoder(ENCODER, device)
    learned = [encode([t.format(text) for text in texts for t in TEMPLATES]) for texts in said.learned]
    head = train_head(image_features(network, train, device), train.labels.to(device), learned, steps=steps, seed=seed)
    tested, labels = image_features(network, test, device), test.labels.to(device)
    figures: dict[str, Any] = {
        name: retrieval(head, tested, labels, [encode(texts) for texts in every])
        for name, every in (("held_out", said.held_out), ("learned", said.learned))
    }
    return head, figures | {"images": len(train), "test_images": len(test)}


def main(
    *,
    data: str = "fashion-mnist",
    phrases: Path | None = None,
    images: int = 8000,
    steps: int = 2000,
    seed: int = 0,
    out: Path = Path("runs/text-image.safetensors"),
    report: Path | None = None,
    device: str = "cpu",
) -> None:
    """Train the head and write its report.

    Args:
        data: "fashion-mnist", "fashion-mnist:FOLDER", or "folder:DIR", of classes or with captions and held-out images.
        phrases: {"class": {"learned": [...], "held_out": [...]}}; those beside this file when left out.
        images: training images that are used, at most; drawn at random.
        steps: updates.
        seed: of images, weights and phrases.
        out: the head's file, for --reward text-image:FILE.
        report: a JSON file of the figures, which the head's file has, too.
        device: "cpu", "cuda", ...
    """
    for file in filter(None, (out, report)):
        check_output(file, folder=False)
    if images < 1 or steps < 1:
        raise ValueError(f"--images {images} --steps {steps}: expected at least 1 of each")
    train, more = load_images(data, encoder=ENCODER), dict[str, Any]()
    if train.captions is not None:
        head, figures = train_on_captions(data, train, steps, seed, device)
    else:
        said = Phrases.read(phrases, train.class_names)
        head, figures = train_on_phrases(data, train, said, images, steps, seed, device)
        more = {"held_out_phrases": said.held_out}
    figures |= {"steps": steps, "seed": seed}
    about = {"features": FEATURES, "sentences": SENTENCES, "width": head.text.out_features}
    save_described(out, head, "text_image", {**about, "classes": train.class_names, "figures": figures})
    if report is not None:
        write_text(report, json.dumps({**made_by(torch.device(device)), **figures, **more}, indent=1) + "\n")
    print(f"{out}: {figures['held_out']}")


if __name__ == "__main__":
    run_script(main)
