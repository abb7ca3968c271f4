"""`marval demo`: the main job on the bundled models, and a short live distillation; without data set or network."""

import dataclasses
import functools
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import UInt8
from rich.console import Console
from rich.table import Table
from torch import Tensor

from marval.cli.arguments import BUNDLED
from marval.config import OneStep
from marval.data import load_fashion_sample
from marval.evaluate.draw import draw_bytes
from marval.evaluate.speed import in_turns, seconds_of
from marval.io.files import check_output, write_text
from marval.io.images import grid, save_picture
from marval.pipeline import Pipeline, load
from marval.presets import DistillConfig
from marval.rewards import Classifier, load_classifier
from marval.runtime.folder import open_run
from marval.runtime.provenance import made_by
from marval.text import SUGGESTED
from marval.train.distill import distill

T = TypeVar("T")
SAMPLES = 100  # images that each model is scored on
REPEATS = 3  # of every timing, after one that warms up
LONG = 3.0  # seconds: a batch that takes longer is drawn once, and needs no warm-up
EMOJI = BUNDLED[:3]  # which draw the suggested prompts, in every style
DRAWN = (  # model, K
    ("fashion-teacher", 16), ("fashion-student", 2), ("fashion-student", 4), ("fashion-student", 8),
    ("fashion-tuned", 4),
)  # fmt: skip
LIVE = DistillConfig(
    updates=130, warmup=30, ema_decay=0.95, learning_rate=6e-5, auxiliary_learning_rate=4e-4,
    iterations=8, probe_every=40, save_every=10_000, name="live student",
)  # fmt: skip


def run(out: Path, device: str) -> None:
    """Draw emoji; draw, time and score models of clothes, and write the report; then distil for half a minute."""
    report = out / "demo.json"
    check_output(report, folder=False)
    judge = load_classifier("fashion-judge").to(device)
    measured: dict[str, Any] = {**made_by(torch.device(device)), "samples": SAMPLES}
    measured["emoji"] = draw_emoji(out, device)
    print(f"Pictures: {out / 'emoji.png'}\n", flush=True)
    measured["rows"] = draw_models(out, device, judge)
    write_text(report, json.dumps(measured, indent=1))
    print(f"Pictures: {out / 'demo.png'}   Report: {report}", flush=True)
    measured["live_distillation"] = distil_live(out, device, judge)
    write_text(report, json.dumps(measured, indent=1))
    print(f"Pictures: {out / 'distillation.png'}")
    # The environment that `make demo` made is not on a newcomer's PATH.
    marval = "marval" if shutil.which("marval") else os.path.relpath(Path(sys.executable).parent / "marval")
    print(f'\nNext:  {marval} sample emoji-student --prompt "a shark" --style 3d --count 8')
    print(f"       {marval} train --data folder:DIR --out runs/mine      (then distill, tune: see README)")
    print(f"       {marval} serve                                        (see it all in a browser)")


def draw_emoji(out: Path, device: str) -> list[dict[str, Any]]:
    """Draw the suggested prompts in every style by each model, on the same seeds; print times, and save `emoji.png`."""
    rows: list[dict[str, Any]] = []
    pictures: dict[str, list[tuple[str, Tensor]]] = {}  # of each style: every model's caption and pictures
    table = Table("model", "K", "one picture", "one of a batch")
    for name in EMOJI:
        pipeline = load(name, device)
        styles, k = pipeline.config.styles, pipeline.default_iterations
        asked = [f"{prompt}, {style}" for style in styles for prompt in SUGGESTED]
        print(f"{name} draws {len(asked)} prompts ...", flush=True)
        one, every = (functools.partial(pipeline.sample, some) for some in (asked[:1], asked))
        alone, batch, images = time_drawing(one, every, pipeline.device)
        rows.append({"model": name, "iterations": k, "seconds_alone": alone, "seconds_in_batch": batch / len(asked)})
        table.add_row(name, str(k), *times_told(rows))
        for style, some in zip(styles, images.split(len(SUGGESTED)), strict=True):
            caption = f"{style}, {name.removeprefix('emoji-')}\n{alone * 1000:.0f} ms / image"
            pictures.setdefault(style, []).append((caption, some))
    Console().print(table)
    print("(10x): that many times as fast as the teacher. Times are medians of a few rounds; a long one is timed once.")
    captions, shown = zip(*itertools.chain(*pictures.values()), strict=True)
    title = "The same seeds: teacher, one-step student, reward-tuned student"
    save_picture(out / "emoji.png", grid(shown, captions, SUGGESTED, title, scale=2))
    return rows


def times_told(rows: list[dict[str, Any]]) -> tuple[str, str]:
    """Tell the times of the last row, and how many times as fast as the first one's they are."""
    first, last = rows[0], rows[-1]
    alone, batch = (last[name] for name in ("seconds_alone", "seconds_in_batch"))
    once, each = first["seconds_alone"] / alone, first["seconds_in_batch"] / batch
    return f"{alone * 1000:.0f} ms ({once:.0f}x)", f"{batch * 1000:.1f} ms ({each:.0f}x)"


def draw_models(out: Path, device: str, judge: Classifier) -> list[dict[str, Any]]:
    """Time and score every setting of `DRAWN`, print them as a table, and save `demo.png`."""
    print(f"The same {SAMPLES} pictures from each model ...")
    rows: list[dict[str, Any]] = []
    pictures, captions = [], []
    table = Table("model", "K", "one picture", "one of a batch", "recognised")
    for name, k in DRAWN:
        pipeline = load(name, device)
        one = functools.partial(pipeline.sample, [0], iterations=k)
        many = functools.partial(draw_bytes, pipeline, SAMPLES, k, seed=0)
        alone, batch, (images, labels) = time_drawing(one, many, pipeline.device)
        accuracy = recognised(judge, images, labels)
        rows.append({
            "model": name, "iterations": k, "seconds_alone": alone, "seconds_in_batch": batch / SAMPLES,
            "accuracy": accuracy,
        })  # fmt: skip
        table.add_row(name, str(k), *times_told(rows), f"{accuracy:.0%}")
        pictures.append(images[:10].float() / 255)
        captions.append(f"{name.removeprefix('fashion-')}, K={k}\n{alone * 1000:.0f} ms / image")
    Console().print(table)
    print("Recognised: the classifier sees the class that was asked for.")
    title = "The same seeds: teacher (100 diffusion steps per token, guided), one-step student, reward-tuned student"
    save_picture(out / "demo.png", grid(pictures, captions, pipeline.config.class_names, title, scale=3))
    return rows


def time_drawing(one: Callable[[], Any], many: Callable[[], T], device: torch.device) -> tuple[float, float, T]:
    """Seconds of drawing one picture and a batch of `many`, and what the batch came to.

    Medians, but for a batch that takes long.
    """
    drawn: list[T] = []

    def batch() -> None:
        drawn.append(many())

    once = seconds_of(batch, device)
    jobs = [one] if once > LONG else [one, batch]
    alone, *others = map(statistics.median, in_turns(jobs, REPEATS, device))
    return alone, others[0] if others else once, drawn[-1]


@torch.inference_mode()
def recognised(judge: Classifier, images: UInt8[Tensor, "n c h w"], labels: Tensor) -> float:
    """The share of images in which the held-out classifier sees the class that was asked for."""
    device = next(judge.parameters()).device
    return float((judge(images.to(device).float() / 255).argmax(dim=1).cpu() == labels).float().mean())


def distil_live(out: Path, device: str, judge: Classifier) -> list[dict[str, float]]:
    """Distil the bundled teacher for a hundred updates; scores and pictures before, in between and after."""
    teacher = load("fashion-teacher", device)
    curve: list[dict[str, float]] = []
    pictures, captions = [], []

    def watch(pipeline: Pipeline) -> dict[str, float]:
        images, labels = draw_bytes(pipeline, 2 * SAMPLES, LIVE.iterations, seed=0)
        updates = max(0, min(len(curve) * LIVE.probe_every, LIVE.updates) - LIVE.warmup)  # before, only phi learns
        curve.append({"accuracy": recognised(judge, images, labels)})
        pictures.append(images[:10].float() / 255)
        captions.append(f"{updates} updates\n{curve[-1]['accuracy']:.0%} recognised")
        print(f"after {updates:3} updates: recognised {curve[-1]['accuracy']:.0%}", flush=True)
        return curve[-1]

    print("\nLive distillation of the bundled teacher (GSIM), from the teacher's own weights called once:")
    one_step = OneStep(clip=teacher.config.draw.clip)
    watch(Pipeline(teacher.model, dataclasses.replace(teacher.config, draw=one_step, iterations=LIVE.iterations)))
    with tempfile.TemporaryDirectory() as folder, open_run(Path(folder) / "live") as run:
        distill(teacher.model, teacher.config, LIVE, load_fashion_sample(), run, probe=watch)
    title = f"One call per iteration, K={LIVE.iterations}, while it learns"
    save_picture(out / "distillation.png", grid(pictures, captions, title=title))
    return curve
