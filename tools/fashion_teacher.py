"""Train the Fashion-MNIST teacher that the package bundles: a steady phase, then a cooldown to a learning rate of 0.

    python tools/fashion_teacher.py --out runs/teacher --steady 20000 --cooldown 10000 --device cuda

The state at the end of the steady phase is kept in OUT/steady, so that a longer run can go on from there.
"""

import argparse
import dataclasses
import shutil
import time
from pathlib import Path

import torch

from marval.config import Chain
from marval.data.fashion import load_fashion_mnist
from marval.model.blocks import Block
from marval.model.head import ResBlock
from marval.pipeline import load
from marval.presets import TrainConfig
from marval.runtime.distributed import Workers
from marval.runtime.folder import open_run
from marval.train.teacher import teacher_config, train_teacher


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
    load(given.out, given.device).save(given.out / "half", torch.float16)


if __name__ == "__main__":
    main()
