"""Train the judge of emoji: a small network, which no reward is made of, that tells what a picture shows and its style.

python examples/emoji/judge.py folder:data/emoji --out models/emoji-judge.safetensors
python examples/emoji/score.py models/emoji-judge.safetensors runs/emoji-teacher --data folder:data/emoji

It learns concept and style from all drawings, those that models never see too; each of them is moved, turned, coloured
and blurred anew every time.

A second judge, of another seed, watches a tuning run, so that the one that scores stays unseen:

python examples/emoji/judge.py folder:data/emoji --seed 1 --out models/emoji-watch.safetensors
EMOJI_JUDGE=models/emoji-watch.safetensors marval tune ... --held-out examples/emoji/judge.py:Recognised
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marval.checks import Checked
from marval.cli.arguments import usable_device
from marval.cli.options import run_script
from marval.config import Count
from marval.data import batch_indices, load_images
from marval.io.files import check_output
from marval.presets import ENCODER
from marval.rewards import Prompt
from marval.rewards.classifier import ResidualBlock
from marval.rewards.weights import described_file, load_described, save_described
from marval.runtime.distributed import Workers
from marval.runtime.log import Log
from marval.runtime.provenance import made_by
from marval.runtime.rng import generator
from marval.train.classifier import descend

KIND, MAKER = "emoji_judge", "examples/emoji/judge.py"


@dataclass(frozen=True)
class Drawings:
    """All drawings of a data set."""

    images: Tensor  # (n, 3, h, w) in [0, 1]
    concepts: tuple[str, ...]
    styles: tuple[str, ...]
    concept: Tensor  # (n,) numbers
    style: Tensor  # (n,)
    seen: Tensor  # (n,) whether models are trained on it

    @classmethod
    def read(cls, data: str) -> "Drawings":
        """Read a folder with captions (folder:DIR), of the splits "train" and "held-out"."""
        train = load_images(data, channels=3, encoder=ENCODER)
        held_out = load_images(f"{data}@held-out", size=tuple(train.shape[1:]), channels=3, encoder=ENCODER)
        if train.captions is None or held_out.captions is None or not train.captions.styles:
            raise ValueError(f"{data}: expected drawings with captions and styles, as make_dataset.py makes them")
        return cls(
            torch.cat([train.images, held_out.images]) / 255, train.class_names, train.captions.styles,
            torch.cat([train.labels, held_out.labels]), torch.cat([train.captions.style, held_out.captions.style]),
            torch.arange(len(train) + len(held_out)) < len(train),
        )  # fmt: skip


class Judge(nn.Module):
    """Tells the concept and the style of images in [0, 1]."""

    def __init__(self, concepts: Sequence[str], styles: Sequence[str], width: int):
        super().__init__()
        self.concepts, self.styles, self.width = tuple(concepts), tuple(styles), width
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, 1, 1), ResidualBlock(width, 2 * width, 2), ResidualBlock(2 * width, 4 * width, 2),
            ResidualBlock(4 * width, 4 * width, 1), nn.BatchNorm2d(4 * width), nn.SiLU(), nn.AdaptiveAvgPool2d(2),
            nn.Flatten(), nn.Dropout(0.2),
        )  # fmt: skip
        self.concept = nn.Linear(16 * width, len(concepts))
        self.style = nn.Linear(16 * width, len(styles))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of concepts and styles of images (b, 3, h, w)."""
        features = self.features(images * 2 - 1)
        return self.concept(features), self.style(features)


def augment(images: Tensor, rng: torch.Generator) -> Tensor:
    """Mirror half of the images (b, 3, h, w) in [0, 1]; turn, scale, move, colour and blur each; add a little noise."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(images), *shape, generator=rng)

    angle, size = uniform(-0.15, 0.15), uniform(0.9, 1.15)  # radians; size 1.15 shows more of the white around
    mirror = 1 - 2 * (uniform(0, 1) < 0.5).float()
    turned = torch.stack([angle.cos() * mirror, -angle.sin(), angle.sin() * mirror, angle.cos()], dim=1).view(-1, 2, 2)
    places = torch.cat([turned * size[:, None, None], uniform(-0.12, 0.12, 2, 1)], dim=2)
    x = 1 - F.grid_sample(1 - images, F.affine_grid(places, list(images.shape), False), align_corners=False)
    x = 1 - (1 - x) * uniform(0.9, 1.1, 3, 1, 1)
    x = torch.lerp(x.mean(dim=1, keepdim=True), x, uniform(0.7, 1.2, 1, 1, 1))
    x = torch.lerp(x, F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), uniform(0, 1, 1, 1, 1))
    return (x + 0.03 * torch.randn(x.shape, generator=rng)).clamp(0, 1)


@torch.inference_mode()
def told_right(judge: Judge, drawings: Drawings, images: Tensor, rows: Tensor | slice) -> dict[str, float]:
    """The shares of images whose concept, style and both the judge tells right; `rows` are their drawings."""
    device = next(judge.parameters()).device
    logits = [judge(part.to(device)) for part in images.split(200)]
    concept, style = (torch.cat(x).argmax(dim=1).cpu() for x in zip(*logits, strict=True))
    right = {"concept": concept == drawings.concept[rows], "style": style == drawings.style[rows]}
    right["both"] = right["concept"] & right["style"]
    return {name: float(values.float().mean()) for name, values in right.items()}


@dataclass(frozen=True)
class Training(Checked):
    """how the judge is trained"""

    epochs: Count = 100  # passes over the drawings
    batch_size: Count = 64  # drawings a step
    width: Count = 32  # channels of its first layer
    seed: int = 0  # of weights, order and augmentation
    out: Path = Path("models/emoji-judge.safetensors")  # the judge's file
    device: str = "auto"  # auto, cpu, cuda or cuda:N


def train(data: str, *, settings: Training) -> None:
    """Train a judge on all drawings.

    Args:
        data: folder:DIR, the drawings, as make_dataset.py makes them
    """
    check_output(settings.out, folder=False)
    device, drawings = usable_device(settings.device), Drawings.read(data)
    size = min(settings.batch_size, len(drawings.images))
    steps = settings.epochs * len(drawings.images) // size
    with torch.random.fork_rng(devices=[]):  # torch's layers draw their weights from the global generator
        torch.manual_seed(generator(settings.seed, "judge").initial_seed())
        judge = Judge(drawings.concepts, drawings.styles, settings.width).to(device)
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    log = Log(settings.out.with_suffix(".jsonl"), Workers(), 0, steps, size)
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=0.02)
    for step in descend(optimizer, steps):
        rows = batch_indices(len(drawings.images), size, step, settings.seed)
        images = augment(drawings.images[rows], generator(settings.seed, "augment", step)).to(device)
        with torch.autocast(images.device.type, torch.bfloat16):
            logits = judge(images)
        targets = drawings.concept[rows].to(device), drawings.style[rows].to(device)
        loss = sum(F.cross_entropy(x.float(), y) for x, y in zip(logits, targets, strict=True))
        loss.backward()
        if (step + 1) % 25 == 0 or step + 1 == steps:
            log(step + 1, {"loss": loss.detach()})
    judge.eval()
    told = told_right(judge, drawings, augment(drawings.images, generator(settings.seed, "test")), slice(None))
    about = {"concepts": judge.concepts, "styles": judge.styles, "width": judge.width}
    save_described(settings.out, judge, KIND, {**about, "figures": told, **made_by(torch.device(device))})
    print(f"{settings.out}: of {len(drawings.images)} drawings, moved and coloured anew, {json.dumps(told)}")


def load_judge(file: Path) -> Judge:
    """Read a judge that `train` wrote."""
    build = lambda about: Judge(about["concepts"], about["styles"], about["width"])  # noqa: E731
    return load_described(described_file(file, MAKER), build, KIND, MAKER)


class Recognised(nn.Module):
    """A reward: the probability that the judge in EMOJI_JUDGE gives a prompt's concept and style."""

    def __init__(self) -> None:
        super().__init__()
        self.judge = load_judge(Path(os.environ.get("EMOJI_JUDGE", Training.out)))

    def forward(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        logits, names = self.judge(images), (self.judge.concepts, self.judge.styles)
        asked = [prompt.class_name for prompt in prompts], [prompt.style for prompt in prompts]
        targets = [torch.tensor([*map(known.index, said)]) for known, said in zip(names, asked, strict=True)]
        given = [F.cross_entropy(x, y.to(x.device), reduction="none") for x, y in zip(logits, targets, strict=True)]
        return torch.exp(-sum(given))


if __name__ == "__main__":
    run_script(train)
