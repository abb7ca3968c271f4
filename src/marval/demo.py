"""`marval demo`: the main job on the bundled models, and a short live distillation."""

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from marval.config import DistillConfig, OneStep
from marval.data import load_images
from marval.evaluate.images import draw_bytes
from marval.evaluate.judge import Judge, load_judge
from marval.io.files import write_text
from marval.io.images import grid, save_picture
from marval.pipeline import Pipeline, load
from marval.provenance import provenance
from marval.train.distill import distill

SAMPLES = 100  # images that each model is scored on
DRAWN = {"fashion-teacher": (16,), "fashion-student": (4, 6, 16), "fashion-tuned": (6,)}  # model: K


def run(out: Path, device: str) -> None:
    """Draw, time and score the bundled models on the same seeds; then distil the teacher anew for a minute or two."""
    judge = load_judge("fashion-mnist", Path("fashion-judge"), lambda: load_images("fashion-mnist"))
    rows: list[dict[str, Any]] = []
    pictures, labels_shown = [], []
    for name, iterations in DRAWN.items():
        pipeline = load(name, device)
        pipeline.sample([0], iterations=1)  # warm-up
        for k in iterations:
            began = time.perf_counter()
            pipeline.sample([0], iterations=k)
            single = time.perf_counter() - began
            began = time.perf_counter()
            images, labels = draw_bytes(pipeline, SAMPLES, k, seed=0)
            seconds = (time.perf_counter() - began) / SAMPLES
            row = {"model": name, "iterations": k, "seconds_alone": single, "seconds_in_batch": seconds}
            rows.append({**row, "samples": SAMPLES, **judge.figures(images, labels)})
            first = rows[0]
            faster = (
                f"{first['seconds_alone'] / single:.0f}x alone, {first['seconds_in_batch'] / seconds:.0f}x in a batch"
            )
            scores = f"accuracy {rows[-1]['accuracy']:.2f}, FD-EfficientNet {rows[-1]['fd']:.1f} ({SAMPLES} samples)"
            print(
                f"{name} K={k}: {single * 1000:.0f} ms alone, {seconds * 1000:.1f} ms in a batch ({faster}); {scores}"
            )
            pictures.append(images[:10].float() / 255)
            labels_shown.append(f"{name.removeprefix('fashion-')}, K={k}\n{single * 1000:.0f} ms / image")
    title = "The same seeds: teacher (100 diffusion steps per token, guided), one-step student, reward-tuned student"
    save_picture(out / "demo.png", grid(pictures, labels_shown, pipeline.config.class_names, title, scale=3))
    curve = live_distillation(out, device, judge)
    write_text(out / "demo.json", json.dumps({**provenance(0), "rows": rows, "live_distillation": curve}, indent=1))
    print(f"\nPictures: {out / 'demo.png'}, {out / 'distillation.png'}   Report: {out / 'demo.json'}")
    print("Next:  marval sample fashion-student --classes sneaker,bag --count 16 --out samples")
    print("       marval evaluate fashion-student --iterations 4 8 16 --samples 2000 --out results/mine.json")
    print("       marval train --data folder:DIR --out runs/mine      (then distill, finetune: see README)")
    print("       marval serve                                        (see it all in a browser)")


def live_distillation(out: Path, device: str, judge: Judge) -> list[dict[str, float]]:
    """Distil the bundled teacher for 200 updates; figures and pictures before, in between and after."""
    teacher = load("fashion-teacher", device)
    settings = DistillConfig(
        iterations=230, warmup=30, ema_decay=0.95, learning_rate=6e-5, auxiliary_learning_rate=4e-4,
        sample_iterations=8, probe_every=50, save_every=10_000, name="live student",
    )  # fmt: skip
    curve: list[dict[str, float]] = []
    pictures: list[torch.Tensor] = []

    def watch(pipeline: Pipeline) -> dict[str, float]:
        images, labels = draw_bytes(pipeline, SAMPLES * 2, 8, seed=0)
        figures = judge.figures(images, labels)
        curve.append(figures)
        pictures.append(images[:10].float() / 255)
        return figures

    print("\nLive distillation of the bundled teacher (GSIM), from the teacher's own weights called once:")
    untrained = dataclasses.replace(teacher.config, draw=OneStep(clip=teacher.config.draw.clip), iterations=8)
    before = watch(Pipeline(teacher.model, untrained))
    print(f"before: FD-EfficientNet {before['fd']:.1f}")
    folder = out / "live"
    shutil.rmtree(folder, ignore_errors=True)
    distill(teacher.model, teacher.config, settings, load_images("fashion-mnist"), folder, probe=watch)
    updates = [max(0, min(i * settings.probe_every, settings.iterations) - settings.warmup) for i in range(len(curve))]
    labels = [f"{n} updates\nFD {figures['fd']:.0f}" for n, figures in zip(updates, curve, strict=True)]
    save_picture(out / "distillation.png", grid(pictures, labels, title="One call per iteration, K=8, while it learns"))
    return curve
