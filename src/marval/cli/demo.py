"""`marval demo`: the main job on the bundled models, and a short live distillation; without data set or network."""

import dataclasses
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, UInt8
from rich.console import Console
from rich.table import Table
from torch import Tensor

from marval.config import OneStep
from marval.data import load_fashion_sample
from marval.evaluate.draw import draw_bytes
from marval.evaluate.speed import in_turns
from marval.io.files import check_output, write_text
from marval.io.images import grid, save_picture
from marval.pipeline import Pipeline, load
from marval.presets import DistillConfig
from marval.rewards import Classifier, load_classifier
from marval.runtime.folder import open_run
from marval.runtime.provenance import made_by
from marval.train.distill import distill

SAMPLES = 100  # images that each model is scored on
REPEATS = 3  # of every timing, after one that warms up
DRAWN = (  # model, K
    ("fashion-teacher", 16), ("fashion-student", 2), ("fashion-student", 4), ("fashion-student", 8),
    ("fashion-tuned", 4),
)  # fmt: skip
LIVE = DistillConfig(
    updates=130, warmup=30, ema_decay=0.95, learning_rate=6e-5, auxiliary_learning_rate=4e-4,
    iterations=8, probe_every=40, save_every=10_000, name="live student",
)  # fmt: skip


def run(out: Path, device: str) -> None:
    """Draw, time and score the bundled models, and write the report; then distil the teacher for half a minute."""
    report = out / "demo.json"
    check_output(report, folder=False)
    judge = load_classifier("fashion-judge").to(device)
    measured: dict[str, Any] = {**made_by(torch.device(device)), "samples": SAMPLES, "repeats": REPEATS}
    measured["rows"] = draw_models(out, device, judge)
    write_text(report, json.dumps(measured, indent=1))
    print(f"Pictures: {out / 'demo.png'}   Report: {report}", flush=True)
    measured["live_distillation"] = distil_live(out, device, judge)
    write_text(report, json.dumps(measured, indent=1))
    print(f"Pictures: {out / 'distillation.png'}")
    # The environment that `make demo` made is not on a newcomer's PATH.
    marval = "marval" if shutil.which("marval") else os.path.relpath(Path(sys.executable).parent / "marval")
    print(f"\nNext:  {marval} sample fashion-student --classes sneaker,bag --count 16 --out samples")
    print(f"       {marval} train --data folder:DIR --out runs/mine      (then distill, tune: see README)")
    print(f"       {marval} serve                                        (see it all in a browser)")


def draw_models(out: Path, device: str, judge: Classifier) -> list[dict[str, Any]]:
    """Time and score every setting of `DRAWN`, print them as a table, and save `demo.png`."""
    print(f"The same {SAMPLES} pictures from each model (times: the median of {REPEATS} rounds after a warm-up) ...")
    rows: list[dict[str, Any]] = []
    pictures, captions = [], []
    table = Table("model", "K", "one picture", "one of a batch", "recognised")
    for name, k in DRAWN:
        pipeline = load(name, device)
        alone, batch, images, labels = time_drawing(pipeline, k)
        accuracy = recognised(judge, images, labels)
        rows.append({
            "model": name, "iterations": k, "seconds_alone": alone, "seconds_in_batch": batch, "accuracy": accuracy
        })  # fmt: skip
        once, each = rows[0]["seconds_alone"] / alone, rows[0]["seconds_in_batch"] / batch
        times = f"{alone * 1000:.0f} ms ({once:.0f}x)", f"{batch * 1000:.1f} ms ({each:.0f}x)"
        table.add_row(name, str(k), *times, f"{accuracy:.0%}")
        pictures.append(images[:10].float() / 255)
        captions.append(f"{name.removeprefix('fashion-')}, K={k}\n{alone * 1000:.0f} ms / image")
    Console().print(table)
    print(
        "(10x): that many times as fast as the teacher.  Recognised: the classifier sees the class that was asked for."
    )
    title = "The same seeds: teacher (100 diffusion steps per token, guided), one-step student, reward-tuned student"
    save_picture(out / "demo.png", grid(pictures, captions, pipeline.config.class_names, title, scale=3))
    return rows


def time_drawing(pipeline: Pipeline, k: int) -> tuple[float, float, UInt8[Tensor, "n c h w"], Int[Tensor, " n"]]:
    """Seconds of a picture alone, of one of a batch (medians), and the batch's images and labels."""
    drawn = []

    def draw_batch() -> None:
        drawn.append(draw_bytes(pipeline, SAMPLES, k, seed=0))

    times = in_turns([lambda: pipeline.sample([0], iterations=k), draw_batch], REPEATS, pipeline.device)
    alone, batch = map(statistics.median, times)
    return alone, batch / SAMPLES, *drawn[0]


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
