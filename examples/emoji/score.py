"""Score models of emoji by a judge that no reward saw: what does each picture show, in which style, and is it a copy?

python examples/emoji/judge.py folder:data/emoji --out models/emoji-judge.safetensors
python examples/emoji/score.py models/emoji-judge.safetensors runs/emoji-teacher runs/emoji-student \\
    --data folder:data/emoji --out results/my-emoji.json --sheets sheets

Pictures are drawn of pairs of concept and style that a model was trained on ("seen") and of pairs that it never met
("held_out"). The results file gets a row for each model, with these figures of both groups:

- concept, style, both: the share of pictures whose concept (of all), style, or both the judge tells right;
- own_distance: how far a picture is from the drawing of its pair, which of held-out pairs only the judge saw;
- nearest_distance: how far it is from the nearest drawing that the model was trained on;
- own_is_nearest: the share of pictures to which, of all drawings, that of their pair is the nearest.

Distances are root mean squares of pixels in [0, 1] at half size; a drawing's mirror counts as the drawing. Three rows
are there to compare with: the drawings themselves, moved and coloured as the judge learned them; the drawings through a
model's tokens and back, which it cannot surpass; and copies, each of the same concept in another style.

The sheets show drawing, picture and nearest training drawing below each other.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from judge import Drawings, Judge, augment, load_judge, told_right
from torch import Tensor

from marval.checks import Checked
from marval.cli.arguments import usable_device
from marval.cli.options import run_script
from marval.config import Count, LatentSpace, PixelSpace, Steps
from marval.evaluate.models import load_models
from marval.evaluate.results import Row, check_rows, merge_results, read_results
from marval.io.files import check_output, sha256_of
from marval.io.images import grid, save_picture
from marval.pipeline import Pipeline
from marval.runtime.provenance import made_by
from marval.runtime.rng import generator

GROUPS = "seen", "held_out"
TOGETHER, SHOWN, COLUMNS = 50, 32, 16  # images at a time; of each group on a sheet, and in a row of it


def distances(images: Tensor, drawings: Tensor) -> Tensor:
    """How far images (n, 3, h, w) are from drawings (m, 3, h, w) or their mirrors, whichever is nearer: (n, m)."""
    x, y, mirror = (F.avg_pool2d(part, 2).flatten(1) for part in (images, drawings, drawings.flip(3)))
    return torch.minimum(torch.cdist(x, y), torch.cdist(x, mirror)) / x.shape[1] ** 0.5


def figures_of(judge: Judge, drawings: Drawings, images: Tensor, rows: Tensor) -> tuple[dict[str, float], Tensor]:
    """Every figure of the pictures of some drawings' pairs, and the numbers of the nearest drawings of training."""
    far = distances(images, drawings.images)
    own = far.gather(1, rows[:, None])[:, 0]
    training = far.masked_fill(~drawings.seen, torch.inf)
    figures = {
        **told_right(judge, drawings, images, rows),
        "own_distance": float(own.mean()),
        "nearest_distance": float(training.amin(dim=1).mean()),
        "own_is_nearest": float((far.argmin(dim=1) == rows).float().mean()),
    }
    return figures, training.argmin(dim=1)


@dataclass(frozen=True)
class Scoring(Checked):
    """what to score, and how"""

    data: str = "folder:data/emoji"  # the drawings
    images: Count = 300  # that a model draws of seen pairs, and as many of held-out ones, which take turns
    seed: int = 0  # of the first picture; the next ones count on from it
    iterations: int | None = None  # K; the model's own when left out, as the two below
    guidance: float | None = None  # w of teachers, and of students that take it
    diffusion_steps: Steps | None = None  # T of teachers
    out: Path = Path("results/my-emoji.json")  # the results file
    sheets: Path | None = None  # a folder for a sheet of pictures for each model
    device: str = "auto"  # auto, cpu, cuda or cuda:N


def asked(drawings: Drawings, pipeline: Pipeline, group: str, count: int) -> tuple[Tensor, list[int]]:
    """Which drawings' pairs a model is to draw, and its labels for them; those that it knows take turns, spread out."""
    config = pipeline.config
    if not config.encoder or config.styles != drawings.styles:
        raise ValueError(f"{config.name} draws no prompts in the styles {', '.join(drawings.styles)}, as the data have")
    place = {name: number for number, name in enumerate(config.class_names)}
    concepts = [place.get(drawings.concepts[i], -1) for i in drawings.concept.tolist()]
    labels = torch.tensor(concepts) * len(config.styles) + drawings.style
    unseen = torch.isin(labels, torch.tensor(config.unseen, dtype=torch.long))
    rows = ((labels >= 0) & (unseen == (group == "held_out"))).nonzero()[:, 0]
    if not len(rows):
        raise ValueError(f"{config.name} knows no {group} pair of the data")
    turns = torch.arange(count)
    rows = rows[turns % len(rows)] if count > len(rows) else rows[turns * len(rows) // count]
    return rows, labels[rows].tolist()


@torch.inference_mode()
def limits(judge: Judge, drawings: Drawings, pipeline: Pipeline) -> dict[str, dict[str, float]]:
    """The figures of the drawings themselves, of those through a model's token space, and of copies of other styles."""
    space, device, config = pipeline.space, pipeline.device, pipeline.config
    through = Path(config.space.vae).name if config.space.kind == "latents" else f"the tokens of {config.name}"
    decoded = [space.decode(space.encode(part.to(device))).cpu() for part in drawings.images.split(TOGETHER)]
    same = drawings.concept[:, None] == drawings.concept
    other = same & (drawings.style[:, None] != drawings.style) & drawings.seen
    every = torch.ones_like(drawings.seen)
    made = {
        "drawings": (augment(drawings.images, generator("limits")), every),
        f"drawings through {through}": (torch.cat(decoded), every),
        "copies": (drawings.images[other.float().argmax(dim=1)], other.any(dim=1)),
    }
    figures: dict[str, dict[str, float]] = {name: {} for name in made}
    for name, (images, there) in made.items():
        for group, chosen in zip(GROUPS, (drawings.seen, ~drawings.seen), strict=True):
            rows = (chosen & there).nonzero()[:, 0]
            said, _ = figures_of(judge, drawings, images[rows], rows)
            figures[name] |= {f"{group}_{key}": value for key, value in said.items()}
    return figures


def sheet_rows(drawings: Drawings, rows: Tensor, images: Tensor, nearest: Tensor) -> list[Tensor]:
    """Rows of a sheet: drawings, the pictures of their pairs, and the nearest drawings of training."""
    shown = torch.arange(count := min(SHOWN, len(rows))) * len(rows) // count
    three = drawings.images[rows[shown]], images[shown], drawings.images[nearest[shown]]
    return [row for rows in zip(*(x.split(COLUMNS) for x in three), strict=True) for row in rows]


def score(judge: Path, models: tuple[str, ...] = (), *, settings: Scoring) -> None:
    """Score models of emoji by a judge, and write the figures.

    Args:
        judge: the judge's file
        models: models' or runs' folders
    """
    check_output(settings.out, folder=False)
    device, drawings, network = usable_device(settings.device), Drawings.read(settings.data), load_judge(judge)
    if (network.concepts, network.styles) != (drawings.concepts, drawings.styles):
        raise ValueError(f"{judge} was trained on other concepts or styles than {settings.data} has: train another")
    network.to(device)
    made = {"classifier_sha256": sha256_of(judge), "made": made_by(torch.device(device))}
    asked_for = {"guidance": settings.guidance, "diffusion_steps": settings.diffusion_steps}
    chosen = {name: () if value is None else (value,) for name, value in asked_for.items()}
    limited: set[PixelSpace | LatentSpace] = set()  # token spaces whose limits are measured
    loaded = load_models(models, device, **chosen)
    known = [{"model": p.config.name, "sha256": digest, "classifier_sha256": sha256_of(judge)} for digest, p in loaded]
    check_rows(known, read_results(settings.out), "pairs", settings.out)
    for digest, pipeline in loaded:
        figures, lines, config = Row(), [], pipeline.config
        for group in GROUPS:
            rows, labels = asked(drawings, pipeline, group, settings.images)
            images = pipeline.sample(labels, seed=settings.seed, iterations=settings.iterations, batch_size=TOGETHER)
            said, nearest = figures_of(network, drawings, images, rows)
            figures |= {f"{group}_{key}": value for key, value in said.items()}
            lines += sheet_rows(drawings, rows, images, nearest)
        dials = {name: getattr(config.draw, name) for name in config.dials}
        row = {
            "model": config.name, "sha256": digest, "draw": dials, "seed": settings.seed,
            "iterations": settings.iterations or pipeline.default_iterations, "samples": settings.images,
        }  # fmt: skip
        reached = [
            {"model": name, "draw": {}, "iterations": 0, "samples": len(drawings.images), **said, **made}
            for name, said in ({} if config.space in limited else limits(network, drawings, pipeline)).items()
        ]
        limited.add(config.space)
        merge_results(settings.out, "pairs", [*reached, {**row, **figures, **made}])
        print(f"{config.name}: {json.dumps({name: round(value, 3) for name, value in figures.items()})}")
        if settings.sheets is not None:
            names = ["drawing", "picture", "nearest\nin training"] * (len(lines) // 3)
            save_picture(settings.sheets / f"{config.name}.png", grid(lines, names, scale=2))


if __name__ == "__main__":
    run_script(score)
