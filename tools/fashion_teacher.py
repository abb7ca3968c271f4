"""Train the Fashion-MNIST teacher that the package bundles: a steady phase, then a cooldown to a learning rate of 0.

    python tools/fashion_teacher.py --out runs/teacher --steady 20000 --cooldown 10000 --device cuda

The state at the end of the steady phase is kept in OUT/steady, so that a longer run can go on from there. With
--samples, 5,000 pictures of each guidance scale are drawn (K = 16, T = 100) into OUT/samples-W.npz, for
`marval evaluate` elsewhere.
"""

import argparse
import dataclasses
import shutil
import time
from pathlib import Path

import numpy as np
import torch

from marval.config import Chain
from marval.data.fashion import load_fashion_mnist
from marval.model.blocks import Block
from marval.model.head import ResBlock
from marval.pipeline import Pipeline, load
from marval.presets import TrainConfig
from marval.runtime.distributed import Workers
from marval.runtime.folder import open_run
from marval.sampling import draw_function, sample
from marval.train.teacher import teacher_config, train_teacher


@torch.inference_mode()
def draw_pictures(pipeline: Pipeline, count: int, guidance: float, batch: int = 2500) -> np.ndarray:
    """`count` pictures as bytes, classes in turn; noise is drawn on the device, from one seed."""
    device, mar = pipeline.device, pipeline.config.mar
    draw = draw_function(pipeline.with_draw(guidance=guidance).config, device)
    parts = []
    for first in range(0, count, batch):
        rows = min(batch, count - first)
        rng = torch.Generator(device).manual_seed(first)
        noise = torch.randn(draw.noise_draws, rows, mar.num_tokens, mar.token_dim, generator=rng, device=device)
        labels = torch.arange(first, first + rows, device=device) % mar.num_classes
        condition = pipeline.model.embed(labels)
        tokens = sample(pipeline.model, draw, condition, iterations=16, seeds=first, noise=noise)
        parts.append((pipeline.space.decode(tokens) * 255).round().byte().cpu().numpy())
    return np.concatenate(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", default=None, help="folder of Fashion-MNIST's .gz files")
    parser.add_argument("--steady", type=int, default=20_000, help="updates before the cooldown")
    parser.add_argument("--cooldown", type=int, default=10_000, help="updates in which the learning rate falls to 0")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--head-width", type=int, default=288)
    parser.add_argument("--samples", type=float, nargs="*", default=[], help="guidance scales to draw pictures at")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    if given.compile:
        for module in (Block, ResBlock):
            module.forward = torch.compile(module.forward, dynamic=True)  # type: ignore[method-assign]
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    data = load_fashion_mnist("train", given.data)
    config = teacher_config("fashion-teacher", data, "fashion-mnist", "python tools/fashion_teacher.py")
    mar = dataclasses.replace(
        config.mar, encoder_dim=given.width, decoder_dim=given.width, encoder_heads=given.width // 32,
        decoder_heads=given.width // 32, head_width=given.head_width,
    )  # fmt: skip
    config = dataclasses.replace(config, mar=mar, draw=Chain(guidance=2.0, clip=True))
    settings = TrainConfig(
        updates=given.steady, decay=1, warmup=1000, batch_size=given.batch_size, learning_rate=given.learning_rate,
        ema_decay=0.9995, log_every=100, save_every=5000,
    )  # fmt: skip
    workers = Workers(device=torch.device(given.device))
    began = time.perf_counter()
    with open_run(given.out, workers=workers) as run:
        train_teacher(config, settings, data, run)
    print(f"steady: {given.steady} updates in {time.perf_counter() - began:.0f} s", flush=True)
    shutil.copytree(given.out / f"state-{given.steady:08d}", given.out / "steady", dirs_exist_ok=True)
    longer = dataclasses.replace(settings, updates=given.steady + given.cooldown, decay=given.cooldown)
    if given.cooldown:
        with open_run(given.out, resume=True, workers=workers) as run:
            train_teacher(config, longer, data, run)
    print(f"trained in {time.perf_counter() - began:.0f} s", flush=True)
    pipeline = load(given.out, given.device)
    pipeline.save(given.out / "half", torch.float16)
    for guidance in given.samples:
        began = time.perf_counter()
        np.savez_compressed(given.out / f"samples-{guidance:g}.npz", images=draw_pictures(pipeline, 5000, guidance))
        print(f"w = {guidance:g}: 5,000 pictures in {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
