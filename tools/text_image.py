"""Train the head of the text-image reward; report its retrieval accuracy with phrases that it never saw.

python tools/text_image.py --out runs/text-image.safetensors
python tools/text_image.py --data folder:my-images --phrases my-phrases.json --out runs/mine.safetensors
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from jaxtyping import Float, Int
from torch import Tensor

from marval.data import ImageData, batch_indices, load_images, split_data
from marval.io.files import check_output, write_text
from marval.rewards.efficientnet import EfficientNetFeatures
from marval.rewards.text_image import TextImageHead, save_head, sentence_encoder
from marval.runtime.distributed import Workers
from marval.runtime.log import Log
from marval.runtime.provenance import provenance
from marval.runtime.rng import generator

TEMPLATES = ("{}", "a photo of {}", "a picture of {}", "a high-quality and harmonious picture of {}")
TEMPERATURE = 0.07


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


def train_text_image(
    data: ImageData,
    test: ImageData,
    phrases: Phrases,
    out: Path,
    *,
    images: int = 8000,
    steps: int = 2000,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Train a head, write it to `out`, and return its figures on `test` with the held-out phrases.

    Each step shows a batch of images and one phrase of each class in a random template; the loss is the cross-entropy
    of the image's class among them. `images` of `data` are used at most, drawn at random.
    """
    network, sentence = EfficientNetFeatures().to(device), sentence_encoder(device)
    chosen = torch.randperm(len(data), generator=generator(seed, "images"))[:images]
    features, labels = image_features(network, data, chosen, device), data.labels[chosen].to(device)
    texts = [embed(sentence, [t.format(phrase) for phrase in said for t in TEMPLATES]) for said in phrases.learned]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "text-image").initial_seed())
        head = TextImageHead().to(device)
    head.mean.copy_(features.mean(dim=0))
    head.std.copy_(features.std(dim=0).clamp(min=1e-6))
    optimizer = torch.optim.AdamW(head.parameters(), 1e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    out.parent.mkdir(parents=True, exist_ok=True)
    log = Log(out.with_suffix(".jsonl"), Workers(), 0, steps, batch_size)
    for step in range(steps):
        rng = generator(seed, "step", step)
        rows = batch_indices(len(features), min(batch_size, len(features)), step, seed).to(device)
        shown = torch.stack([said[int(torch.randint(len(said), (), generator=rng))] for said in texts])
        logits = head.embed_images(features[rows]) @ head.embed_texts(shown).T / TEMPERATURE
        loss = F.cross_entropy(logits, labels[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            log(step + 1, {"loss": loss.detach()})
    head.eval()
    everything = torch.arange(len(test))
    tested = image_features(network, test, everything, device)
    figures: dict[str, Any] = {
        name: retrieval(head, tested, test.labels.to(device), [embed(sentence, said) for said in chosen_phrases])
        for name, chosen_phrases in (("held_out", phrases.held_out), ("learned", phrases.learned))
    }
    figures |= {"images": len(features), "test_images": len(test), "steps": steps, "seed": seed}
    save_head(out, head, {"classes": data.class_names, "figures": figures})
    return figures


@torch.no_grad()
def image_features(
    network: EfficientNetFeatures, data: ImageData, indices: Int[Tensor, " n"], device: torch.device | str
) -> Float[Tensor, "n f"]:
    """Features of some images, 250 at a time."""
    return torch.cat([network(data.images[part].to(device)) for part in indices.split(250)])


def embed(sentence: Callable[[str], Tensor], texts: Sequence[str]) -> Float[Tensor, "n t"]:
    """Sentence embeddings of texts."""
    return torch.stack([sentence(text) for text in texts])


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
    scores = [images @ head.embed_texts(said).T for said in texts]
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


def main(
    data: str = "fashion-mnist",
    phrases: Path | None = None,
    images: int = 8000,
    steps: int = 2000,
    seed: int = 0,
    out: Path = Path("runs/text-image.safetensors"),
    report: Path = Path("results/text-image.json"),
    device: str = "cpu",
) -> None:
    """Train the head and write its report.

    Args:
        data: "fashion-mnist", "fashion-mnist:FOLDER", or "folder:DIR".
        phrases: {"class": {"learned": [...], "held_out": [...]}}; those beside this file when left out.
        images: training images that are used.
        steps: updates.
        seed: of images, weights and phrases.
        out: the head's file, for --reward text-image:FILE.
        report: the JSON file of the figures.
        device: "cpu", "cuda", ...
    """
    for file in (out, report):
        check_output(file, folder=False)
    if images < 1 or steps < 1:
        raise ValueError(f"--images {images} --diffusion-steps {steps}: expected at least 1 of each")
    pictures = load_images(data)
    said = Phrases.read(phrases, pictures.class_names)
    if data.startswith("fashion-mnist"):
        test = load_images(data, split="test")
    else:
        pictures, test = split_data(pictures, seed)
    figures = train_text_image(pictures, test, said, out, images=images, steps=steps, seed=seed, device=device)
    write_text(report, json.dumps({**provenance(seed), **figures, "held_out_phrases": said.held_out}, indent=1) + "\n")
    found = figures["held_out"]
    print(
        f"{out}: with {found['phrases']} held-out phrases, {found['image_to_text']:.3f} of {len(test)} images find "
        f"the phrase of their class; {found['text_to_image']:.3f} of the images that a phrase finds first are of its "
        f"class ({report})"
    )


if __name__ == "__main__":
    tyro.cli(main)
