"""MAR-B with random weights on this machine; figures are printed and, with RESULTS, kept in that JSON file.

python tools/full_size.py distill|save|tune IMAGES [RESULTS]: time and peak memory of one training step (save: and
of saving the state and the model).

python tools/full_size.py speed K [RESULTS]: seconds of one guided image (T = 100) by the official loop in plain
PyTorch, by our teacher and by our student.

python tools/full_size.py cached K [RESULTS]: seconds of four images by a student, and by one that reads a token once.
"""

import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from marval.config import Chain, LatentSpace, MARConfig, ModelConfig, OneStep
from marval.evaluate.results import read_results, write_results
from marval.evaluate.speed import seconds_of
from marval.model import MAR
from marval.presets import DistillConfig, TuneConfig
from marval.runtime.folder import open_run
from marval.runtime.philox import standard_normal
from marval.runtime.provenance import made_by
from marval.runtime.rng import generator
from marval.sampling import DrawByChain, DrawInOneStep, sample
from marval.train.distill import distill
from marval.train.tune import tune
from plan import GIB, distill_step, row_of, tune_step

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
from straightforward import straightforward

CPU = torch.device("cpu")


class RandomLatents:
    """Latents of no picture, as a data set."""

    def __init__(self, config):
        self.config, self.shape, self.class_names = config, (config.num_tokens, config.token_dim), ("random",)
        self.labels, self.images = torch.zeros(64, dtype=torch.long), torch.zeros(64, 1, dtype=torch.uint8)

    def __len__(self):
        return 64

    def read(self, indices, keys):
        return standard_normal(keys, (self.config.num_tokens, self.config.token_dim))

    def conditions(self, indices, keys):
        return self.labels[indices]

    def tokens(self, stored, keys, space):
        return stored


def memory(name):
    """A figure of this process in bytes ("VmRSS", or "VmHWM", the most it was)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def save_vae(folder):
    """KL-16 with random weights, as a diffusers folder."""
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 128, 256, 256, 512), layers_per_block=2, latent_channels=16, sample_size=256,
    ).save_pretrained(folder)  # fmt: skip


def report(figures):
    """Print the figures of this command, and keep them."""
    print(json.dumps(figures), flush=True)
    if len(sys.argv) > 3:
        out, stage, count = Path(sys.argv[3]), sys.argv[1], int(sys.argv[2])
        rows = read_results(out).get("full-size", [])
        others = [row for row in rows if (row["stage"], row["count"]) != (stage, count)]
        row = {"stage": stage, "count": count, **figures, "made": made_by(CPU)}
        write_results(out, "full-size", sorted([*others, row], key=lambda row: (row["stage"], row["count"])))


def planned(stage, images):
    """What `tools/plan.py` expects of such a step in one process, in bytes; of tuning, without the VAE."""
    mar, machine = MARConfig.imagenet256("base"), {"gpus": 1, "gpu_gib": 80.0, "tflops": 1.0, "efficiency": 1.0}
    if stage == "distill":
        settings = DistillConfig.imagenet256("base")
        meter = distill_step(mar, settings, images, False, 256)
    else:
        settings = dataclasses.replace(TuneConfig.imagenet256("base"), iterations=(4,), gradient_iterations=1)
        meter = tune_step(mar, settings, images, False, 4)
    row = row_of(stage, mar, settings, machine)
    return (row["weights_gib"] + row["optimiser_gib"]) * GIB + meter.peak


def main(stage, images):
    torch.nn.functional.linear(torch.randn(64, 64), torch.randn(64, 64))  # libraries take what they need
    before = memory("VmRSS")
    mar = MARConfig.imagenet256("base")
    names = tuple(map(str, range(1000)))
    config = ModelConfig(mar, LatentSpace((256, 256), "none"), Chain(guidance=1.2), names, 64, "random")
    model = MAR(mar).initialize(generator(0, "full size")).eval().requires_grad_(False)
    began, calls = time.perf_counter(), []

    def stop(pipeline):
        """Called before anything is saved: by tuning at the start too, then after the step."""
        calls.append(memory("VmHWM") - before)
        if stage != "save" and len(calls) == (1 if stage == "distill" else 2):
            figures = {"seconds": time.perf_counter() - began, "bytes": calls[-1]}
            vae = sum(file.stat().st_size for file in Path(folder).glob("vae/*.safetensors"))  # which no plan counts
            report({**figures, "planned_bytes": planned(stage, images) + vae})
            os._exit(0)
        return {"fd": 1.0, "diversity": 1.0, "log_probability": 0.0}

    once = {"updates": 1, "batch_size": images, "save_every": 10_000}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        if stage in ("distill", "save"):
            # Everything is hidden: every token is drawn.
            settings = dataclasses.replace(
                DistillConfig.imagenet256("base"), **once, warmup=0, checkpoint_blocks=False, tokens_per_image=256
            )
            settings = dataclasses.replace(settings, mask_ratio_min=0.999, mask_ratio_std=1.0, probe_every=1)
            with open_run(out) as run:
                distill(model, config, settings, RandomLatents(mar), run, probe=stop)
            report({"seconds": time.perf_counter() - began, "bytes": memory("VmHWM") - before})
        else:
            save_vae(Path(folder) / "vae")
            config = dataclasses.replace(config, space=LatentSpace((256, 256), str(Path(folder) / "vae")))
            settings = dataclasses.replace(TuneConfig.imagenet256("base"), **once, checkpoint_blocks=False)
            settings = dataclasses.replace(settings, iterations=4, gradient_iterations=1, probe_every=1)
            student = dataclasses.replace(config, draw=OneStep())
            reward = lambda pictures, prompts: pictures.mean(dim=(1, 2, 3))  # noqa: E731
            with open_run(out) as run:
                tune(model, student, reward, settings, run, probe=stop)


def speed(iterations):
    mar = MARConfig.imagenet256("base")
    model = MAR(mar).initialize(generator(0, "full size")).eval().requires_grad_(False)
    chain, labels = Chain(guidance=3.0), torch.tensor([0])

    def ours(draw):
        with torch.inference_mode():
            return sample(model, draw, model.embed(labels), iterations=iterations, seeds=[0])

    jobs = {
        "student": lambda: ours(DrawInOneStep()),
        "teacher": lambda: ours(DrawByChain(chain)),
        "straightforward": lambda: straightforward(model, chain, labels, iterations, [0]),  # plain PyTorch products
    }
    jobs["student"]()  # warms up
    report({name: seconds_of(job, CPU) for name, job in jobs.items()})


def cached(iterations, batch=4):
    mar = MARConfig.imagenet256("base")
    model = MAR(mar).initialize(generator(0, "full size")).eval().requires_grad_(False)
    labels = torch.arange(batch)

    def drawn(name, k):
        model.config = dataclasses.replace(mar, cached=name == "cached")
        with torch.inference_mode():
            return sample(model, DrawInOneStep(), model.embed(labels), iterations=k, seeds=range(batch))

    seconds = {}
    for name in ("cached", "student", "cached again"):  # a machine that is busy for a while shows
        drawn(name.split()[0], 1)  # warms up
        seconds[name] = seconds_of(lambda name=name: drawn(name.split()[0], iterations), CPU)
    report({"batch": batch, **seconds})


if __name__ == "__main__":
    if sys.argv[1] in ("speed", "cached"):
        {"speed": speed, "cached": cached}[sys.argv[1]](int(sys.argv[2]))
    else:
        main(sys.argv[1], int(sys.argv[2]))
