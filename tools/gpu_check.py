"""Check and measure the package on an accelerator, part by part; results go to one JSON file.

    python tools/gpu_check.py --out gpu.json                       # every part, minutes on one GPU
    python tools/gpu_check.py --parts correct sample --out gpu.json
    python tools/gpu_check.py --dry-run --out gpu.json             # the same code with tiny models, on a CPU

Needs a checkout (it reads the parity fixture of the tests), torch, numpy, safetensors, jaxtyping, pillow and rich. A
part that fails is reported with its error; the others run all the same, and the exit code is 1.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import gc
import importlib.util
import itertools
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import marval
from marval.config import Chain, LatentSpace, MARConfig, ModelConfig, OneStep
from marval.data import ImageData
from marval.evaluate.speed import flops_per_image, seconds_of, synchronize
from marval.io.files import write_text
from marval.model import MAR, NoiseSchedule
from marval.pipeline import Pipeline
from marval.presets import DistillConfig, TrainConfig, TuneConfig
from marval.runtime.distributed import GROWING, Workers
from marval.runtime.folder import open_run
from marval.runtime.optim import Optimizer, fast_products, update_ema
from marval.runtime.provenance import made_by
from marval.sampling import DrawByChain, draw_function, image_noise, prepare, run, sample
from marval.sampling.fast import compile_blocks
from marval.spaces import Latents, token_space
from marval.train.anchor import Anchor, AnchorLoss
from marval.train.distill import Inputs, distill, student_loss, student_tokens, target_contexts
from marval.train.draws import NoiseLevels, gsim_draws
from marval.train.flops import gsim_flops
from marval.train.teacher import train_teacher
from marval.train.tune import tune

ROOT = Path(__file__).parent.parent
LONGEST = 3.0  # seconds of timing, after which a job is not timed again
sys.path.insert(0, str(ROOT / "tests" / "helpers"))  # the official sampler's loop, rendered in plain PyTorch


class Check:
    """The machine, the sizes to measure at, and the results so far."""

    def __init__(self, out: Path, dry_run: bool):
        self.out, self.dry_run = out, dry_run
        self.device = torch.device("cpu" if dry_run else "cuda")
        name = "dry run on a CPU" if dry_run else torch.cuda.get_device_name()
        self.results: dict[str, Any] = {"card": name, **made_by(self.device)}

    def run(self, name: str, job: Callable[[], Any]) -> bool:
        """Run one check without what others left in memory; keep its result or its error, and write the file."""
        self.free()
        began = time.perf_counter()
        try:
            found, ok = job(), True
        except Exception as error:  # a check that fails must not cost the others
            found, ok = (
                {"error": f"{type(error).__name__}: {error}"[:500], "trace": traceback.format_exc()[-1500:]},
                False,
            )
        self.results[name] = found
        write_text(self.out, json.dumps(self.results, indent=1, default=str))
        print(f"{name} ({time.perf_counter() - began:.1f} s): {json.dumps(found, default=str)[:600]}", flush=True)
        return ok

    def free(self) -> None:
        """Give the card's memory back; models and their hooks refer to each other in circles."""
        gc.collect()
        if not self.dry_run:
            torch.cuda.empty_cache()

    def once(self, job: Callable[[], Any]) -> float:
        """The wall time of a job."""
        return seconds_of(job, self.device)

    def seconds(self, job: Callable[[], Any], repeats: int = 5) -> dict[str, float]:
        """The median, fastest and slowest wall time of a job, after one run that warms up, in a few seconds."""
        repeats = 1 if self.dry_run else repeats
        job()
        times: list[float] = []
        while len(times) < repeats and sum(times) < LONGEST:
            times.append(self.once(job))
        return {"median": statistics.median(times), "fastest": min(times), "slowest": max(times)}


def within(limit: float, found: dict[str, float]) -> dict[str, float]:
    """What was found.

    Raises:
        ValueError: some of it is above the limit, or not a number.
    """
    above = {name: value for name, value in found.items() if not value <= limit}
    if above:
        raise ValueError(f"above {limit:g}: {above}")
    return found


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    found, expected = found.float().cpu(), expected.float().cpu()
    return ((found - expected).abs().max() / expected.abs().max()).item()


# Part: correct


def parity(check: Check) -> dict[str, float]:
    """The numbers of the official code (tests/golden), in float32 and under bf16 autocast."""
    from recorded import recorded_model, recorded_numbers

    reference = recorded_numbers(check.device)
    model = recorded_model(reference)
    tokens = reference["latents"].flatten(2).transpose(1, 2)
    visible = torch.stack([(row == 0).nonzero()[:, 0] for row in reference["mask"]])
    everywhere = torch.arange(16, device=check.device).expand(2, -1)
    found = {}
    for name, autocast in (("float32", False), ("bf16", True)):
        with torch.autocast(check.device.type, torch.bfloat16, enabled=autocast):
            context = model.context(tokens, visible, everywhere, model.embed(reference["labels"]))
            head = model.head(reference["head.x_t"], reference["head.t"].float(), reference["z"].flatten(0, 1))
            chain = DrawByChain(Chain(guidance=3.0, diffusion_steps=10), device=check.device)
            contexts = torch.stack([reference["z"].flatten(0, 1), reference["z_uncond"].flatten(0, 1)])
            drawn = chain(model.head, contexts, 3.0, reference["chain.noise"][:-1])
        found[f"{name} context"] = difference(context, reference["z"])
        found[f"{name} head"] = difference(head, reference["head.out"])
        found[f"{name} chain"] = difference(drawn, reference["chain.tokens"])
    within(1e-4, {name: value for name, value in found.items() if "float32" in name})
    return within(2e-2, found)


def same_pictures(check: Check) -> dict[str, float]:
    """The bundled models draw the same picture for a seed on the CPU and here, alone and in a batch."""
    found = {}
    for name in ("fashion-student",) if check.dry_run else ("fashion-student", "fashion-teacher"):
        on_cpu, here = marval.load(name), marval.load(name, str(check.device))
        expected = on_cpu.sample([0, 5, 9], seed=3, iterations=4)
        images = here.sample([0, 5, 9], seed=3, iterations=4)
        alone = torch.cat([here.sample([c], seed=3 + i, iterations=4) for i, c in enumerate((0, 5, 9))])
        found[f"{name}: CPU and here"] = (images - expected).abs().max().item()
        found[f"{name}: alone and in a batch"] = (images - alone).abs().max().item()
    return within(1e-3, found)


def tiny() -> tuple[MAR, ModelConfig, ImageData]:
    """A teacher of a few thousand parameters whose head is not all zeros, and images for it."""
    from tiny import tiny_config, tiny_data, tiny_model

    return tiny_model(), tiny_config(), tiny_data()


@contextlib.contextmanager
def refusing_waits(check: Check) -> Iterator[None]:
    """Let torch refuse whatever waits for the device."""
    if not check.dry_run:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if not check.dry_run:
            torch.cuda.set_sync_debug_mode("default")


def no_waits(check: Check) -> dict[str, Any]:
    """The AR loop of a student and of a teacher, and an update of distillation, wait for nothing."""
    found = {}
    for kind, draw_config in (("student", OneStep()), ("teacher", Chain(guidance=3.0, diffusion_steps=5))):
        model = tiny()[0].to(check.device)
        draw = draw_function(random_config(model, draw_config), check.device)
        start = prepare(model, draw, iterations=3, seeds=[0, 1])
        condition = model.embed(torch.tensor([0, 1], device=check.device))
        with refusing_waits(check), torch.inference_mode():
            found[kind] = len(list(run(model, draw, condition, start)))
    teacher, config, data = tiny()
    student, workers = copy.deepcopy(teacher).to(check.device).requires_grad_(True), Workers(device=check.device)
    anchor, space = Anchor(teacher, data, DistillConfig(batch_size=8)), token_space(config.space, check.device)
    config = dataclasses.replace(config, draw=OneStep(clip=True, guidance=2.0))
    held, adam = AnchorLoss(anchor, config, space, workers, "teacher"), Optimizer(student, workers, 1.0, (0.0, 0.999))
    for update in range(3):
        with contextlib.nullcontext() if update == 0 else refusing_waits(check):  # the first makes what others keep
            held.step(student, update, 1.0, student_update=1)
            adam.step(1e-4)
        found["distillation's updates"] = update
    return found


def graphs(check: Check, teacher: bool = True) -> dict[str, Any]:
    """Recorded loops draw what launches one by one draw, whatever befalls their weights; noise is the CPU's."""
    found: dict[str, float] = {}
    here, there = (image_noise([0, 2**40], 3, 64, 16, device).cpu() for device in (check.device, "cpu"))
    found["noise: CPU and here"] = (here - there).abs().max().item()
    for name in ("fashion-student", "fashion-teacher")[: 2 if teacher and not check.dry_run else 1]:
        pipeline = marval.load(name, str(check.device))
        keep = torch.zeros(2, pipeline.config.mar.num_tokens, dtype=torch.bool)
        keep[:, ::3] = True
        inpainted = {"images": torch.rand(2, 1, 28, 28), "keep": keep}
        for case, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16), ("float32 again", torch.float32)):
            pipeline.to(dtype=dtype)
            for known in ({}, inpainted):
                draw = functools.partial(pipeline.sample, [0, 5], seed=3, iterations=4, **known)
                pipeline.graphs.work = False
                expected = draw()
                pipeline.graphs.work = True
                drawn = [draw() for _ in range(4)]
                title = f"{name}: graph and launches, {case}" + ", inpainted" * bool(known)
                found[title] = max((images - expected).abs().max().item() for images in drawn)
                if not check.dry_run and not any(pipeline.graphs.loops.kept.values()):
                    raise ValueError(f"{title}: no graph was recorded")
    within(1e-3, {name: value for name, value in found.items() if "bf16" not in name})
    return within(5e-2, found)


def gradients_here(check: Check, job: Callable[[torch.device], dict[str, Tensor]]) -> dict[str, float]:
    """Gradients here against the CPU's, in float32."""
    here, expected = job(check.device), job(torch.device("cpu"))
    largest = max(difference(here[name], expected[name]) for name in expected if expected[name].any())
    return within(1e-2, {"largest relative difference": largest})


def gradients_of(student: MAR) -> dict[str, Tensor]:
    return {name: p.grad.cpu() for name, p in student.named_parameters() if p.grad is not None}


def gsim_gradients(check: Check) -> dict[str, float]:
    """The gradients of one theta step."""

    def gradients(device: torch.device) -> dict[str, Tensor]:
        teacher, config, data = tiny()
        config = dataclasses.replace(config, draw=OneStep(clip=True))
        settings = DistillConfig(objective="gsim", batch_size=8, autocast=False)
        student = copy.deepcopy(teacher).to(device).requires_grad_(True)
        teacher, phi = teacher.to(device), copy.deepcopy(teacher.head).to(device)
        part = gsim_draws(settings, config.mar, 0).part(slice(None))  # on the CPU: both devices get the same
        space, schedule = token_space(config.space, device), NoiseSchedule.full(device)
        keys, labels = torch.arange(8), data.labels[:8].to(device)
        tokens = data.tokens(data.read(keys, keys).to(device), keys.to(device), space)
        inputs = Inputs(tokens, part.visible.to(device), part.targets.to(device), labels)
        z, levels = part.z.to(device), NoiseLevels(*(x.to(device) for x in part.theta))
        with torch.no_grad():
            c = target_contexts(teacher, inputs, guided=True, autocast=False)
        x_0, _ = student_tokens(student, draw_function(config, check.device), inputs, 1.5, z, False)
        student_loss((teacher.head, phi), schedule, x_0, levels, c, 1.5, settings.objective)[0].backward()
        return gradients_of(student)

    return gradients_here(check, gradients)


def tuning_gradients(check: Check) -> dict[str, float]:
    """The gradients of a reward through the last three of four AR iterations."""

    def gradients(device: torch.device) -> dict[str, Tensor]:
        student, config, _ = tiny()
        student = student.to(device).requires_grad_(True)
        draw = draw_function(dataclasses.replace(config, draw=OneStep(clip=True)), device)
        condition = student.embed(torch.tensor([0, 1], device=device))
        tokens = sample(student, draw, condition, iterations=4, seeds=0, gradient_iterations=3)
        token_space(config.space, device).decode(tokens).mean().backward()
        return gradients_of(student)

    return gradients_here(check, gradients)


def resume(check: Check) -> dict[str, Any]:
    """Eight steps of each stage, and four and four: the same weights."""
    teacher, config, data = tiny()
    found: dict[str, Any] = {}

    def score(pictures: Tensor, prompts: Any) -> Tensor:
        return pictures.mean(dim=(1, 2, 3))

    def no_probe(_: Any) -> dict[str, float]:
        return {"fd": 1.0, "diversity": 1.0, "log_probability": 0.0}

    def stage(name: str, out: Path, updates: int, resume: bool) -> None:
        every = {"updates": updates, "save_every": 4, "log_every": 4, "batch_size": 8}
        with open_run(out, resume=resume, workers=Workers(device=check.device)) as run:
            if name == "train":
                train_teacher(config, TrainConfig(warmup=2, decay=1, **every), data, run)
            elif name == "distill":
                distill(copy.deepcopy(teacher), config, DistillConfig(warmup=2, decay=1, **every), data, run)
            else:
                student = dataclasses.replace(config, draw=OneStep(clip=True))
                settings = TuneConfig(iterations=(4,), probe_every=100, **every)
                tune(copy.deepcopy(teacher), student, score, settings, run, probe=no_probe)

    with tempfile.TemporaryDirectory() as folder:
        for name in ("train", "distill", "tune"):
            whole, parts = Path(folder) / f"{name}-whole", Path(folder) / f"{name}-parts"
            stage(name, whole, 8, False)
            stage(name, parts, 4, False)
            stage(name, parts, 8, True)
            a, b = (load_file(next(p.glob("state-*/*.safetensors"))) for p in (whole, parts))
            found[name] = max((a[key].float() - b[key].float()).abs().max().item() for key in a if a[key].numel())
    return within(1e-4, found)


def one_rank(check: Check) -> dict[str, float]:
    """A group of one process (NCCL on a GPU), with whole networks and with sharded ones, against a process alone."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    model, config, data = tiny()
    kind, found = check.device.type, {}
    device = check.device if kind == "cpu" else torch.device(kind, 0)
    with tempfile.TemporaryDirectory() as folder:

        def weights(name: str, workers: Workers, autocast: bool) -> dict[str, Tensor]:
            settings = TrainConfig(updates=2, batch_size=8, warmup=1, decay=1, autocast=autocast)
            out = Path(folder) / f"{name}-{autocast}"
            with open_run(out, workers=workers) as run:
                train_teacher(config, settings, data, run)
            student = DistillConfig(updates=3, batch_size=8, warmup=1, decay=1, autocast=autocast, guidance=1.5)
            with open_run(out / "student", workers=workers) as run:  # it draws without gradients, and with them
                distill(copy.deepcopy(model), config, student, data, run)
            return load_file(out / "model" / "model.safetensors")

        alone = {autocast: weights("alone", Workers(device=device), autocast) for autocast in (False, True)}
        backend = "gloo" if kind == "cpu" else f"cpu:gloo,{kind}:nccl"
        dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        try:
            for shard, autocast in itertools.product((False, True), (False, True)):
                workers = Workers(0, 1, device, init_device_mesh(kind, (1,)), shard=shard)
                here = weights("sharded" if shard else "whole", workers, autocast)
                name = ("sharded" if shard else "whole") + (", bf16" if autocast else "")
                found[f"{name}: largest difference of weights"] = max(
                    (alone[autocast][key] - here[key]).abs().max().item() for key in here
                )
        finally:
            dist.destroy_process_group()
    return within(1e-5, found)


# Part: sample


def full_size(check: Check, size: str) -> MAR:
    """MAR-B, -L or -H with random weights; a small one in a dry run."""
    if check.dry_run:
        mar = dataclasses.replace(
            MARConfig.imagenet256("base"), encoder_dim=32, encoder_depth=1, encoder_heads=2,
            decoder_dim=32, decoder_depth=2, decoder_heads=2, head_width=32, head_depth=2,
        )  # fmt: skip
    else:
        mar = MARConfig.imagenet256(size)  # type: ignore[arg-type]
    with torch.device(check.device):
        model = MAR(mar)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model.eval().requires_grad_(False)


def random_config(model: MAR, draw: Chain | OneStep) -> ModelConfig:
    """The configuration of a model with random weights, on latents of no VAE."""
    names = tuple(map(str, range(model.config.num_classes)))
    return ModelConfig(model.config, LatentSpace((256, 256), "none"), draw, names, 64, "random")


def peak(check: Check) -> dict[str, float]:
    """What the card gives: matrix products in bf16, float32 and TF32, and a copy, in TFLOP/s and TB/s."""
    side, found = (256 if check.dry_run else 8192), {}
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "ieee"),
        ("float32", torch.float32, "ieee"),
        ("tf32", torch.float32, "tf32"),
    ):
        torch.backends.cuda.matmul.fp32_precision = precision
        x, w = (torch.randn(side, side, device=check.device, dtype=dtype) for _ in range(2))
        found[f"{name} TFLOP/s"] = 2 * side**3 / check.seconds(lambda x=x, w=w: x @ w, 10)["fastest"] / 1e12
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    big = torch.randn(2**20 if check.dry_run else 2**30, device=check.device)
    target = torch.empty_like(big)
    found["copy TB/s, read and written"] = (
        2 * big.nbytes / check.seconds(lambda: target.copy_(big), 10)["fastest"] / 1e12
    )
    return found


def drawing(
    model: MAR, draw: Chain | OneStep, iterations: int, batch: int, mode: str
) -> tuple[Callable[[], Tensor], dict[str, float]]:
    """A call that draws a batch of latents as `Pipeline.sample` does, and what its first calls tell.

    That is how long the first took, and how far a graph's latents are from those of launches. See `sampling_table`.
    """
    pipeline = Pipeline(copy.deepcopy(model), random_config(model, draw))
    if "bf16" in mode:
        pipeline.to(dtype=torch.bfloat16)
    if "compiled" in mode:
        pipeline.compile()
    pipeline.graphs.work = "graph" in mode
    labels = [i % model.config.num_classes for i in range(batch)]

    def run() -> Tensor:
        return pipeline.sample_tokens(labels, seeds=range(batch), iterations=iterations, order="random")

    synchronize(model.mask_token.device)
    began = time.perf_counter()
    launched = run()
    synchronize(model.mask_token.device)
    first = {"seconds of the first call": time.perf_counter() - began}  # compiling and planning included
    if "graph" not in mode:
        return run, first
    _, replayed = run(), run()  # the one records, the other replays
    if model.mask_token.is_cuda and not any(pipeline.graphs.loops.kept.values()):
        raise ValueError("no graph was recorded")
    return run, first | {"graph and launches": difference(replayed, launched)}


def sampling_table(check: Check, size: str, settings: list[tuple[str, int, int, str]]) -> list[dict[str, Any]]:
    """Milliseconds per image of (role, K, batch, mode), with the share of the card's limits.

    A mode has some of bf16 (weights), graph, and compiled (blocks, for any number of tokens).
    """
    model = full_size(check, size)
    parameters = sum(p.numel() for p in model.parameters())
    rows: list[dict[str, Any]] = []
    bf16, memory = (check.results["peak"][name] * 1e12 for name in ("bf16 TFLOP/s", "copy TB/s, read and written"))
    for role, iterations, batch, mode in settings:
        draw: Chain | OneStep = Chain(guidance=3.0) if role != "student" else OneStep()
        row: dict[str, Any] = {"size": size, "role": role, "iterations": iterations, "batch": batch, "mode": mode}
        job: Callable[[], Any]
        try:
            if role == "official loop":
                from straightforward import straightforward

                labels = torch.arange(batch, device=check.device)

                def job(labels: Tensor = labels, k: int = iterations) -> Any:
                    with torch.autocast(check.device.type, torch.bfloat16):
                        return straightforward(model, Chain(guidance=3.0), labels, k, list(range(len(labels))))
            else:
                job, first = drawing(model, draw, iterations, batch, mode)
                row |= first
            taken = check.seconds(job, 10 if (role, batch) == ("student", 1) else 3)
            flops = flops_per_image(random_config(model, draw), iterations)
            row |= {f"ms per image, {name}": value / batch * 1000 for name, value in taken.items()}
            row["share of bf16 peak"] = flops * batch / taken["median"] / bf16
            row["share of read limit"] = iterations * 2 * parameters / memory / taken["median"]
            del job
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:300]
        rows.append(row)
        print("   ", json.dumps(row)[:300], flush=True)
        check.free()
    return rows


def decoder(check: Check) -> dict[str, Any]:
    """KL-16's decoder with random weights, in bf16, and one picture of a student from its noise to the host.

    Milliseconds per image, with CUDA graphs and without; the student's blocks are compiled.
    """
    from diffusers import AutoencoderKL

    width = (32,) * 5 if check.dry_run else (128, 128, 256, 256, 512)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4,
        block_out_channels=width, layers_per_block=2, latent_channels=16, sample_size=256,
    )  # fmt: skip
    space = Latents(LatentSpace((256, 256), "random"), vae=vae)
    model = full_size(check, "base")
    config = dataclasses.replace(random_config(model, OneStep()), space=space.config)
    pipeline = Pipeline(model, config, space).to(check.device, torch.bfloat16)
    found: dict[str, Any] = {}
    for graph, batch in [(False, 1)] if check.dry_run else [(False, 1), (True, 1), (False, 4), (True, 4), (False, 32)]:
        pipeline.graphs.work = graph
        tokens = torch.randn(batch, 256, 16, device=check.device)
        job = torch.inference_mode()(lambda tokens=tokens: pipeline.decode(tokens))
        launched, _, replayed = (job() for _ in range(3))
        within(5e-2, {"graph and launches": difference(replayed, launched)})
        found[f"decoder, batch {batch}" + ", graph" * graph] = check.seconds(job)["median"] / batch * 1000
    if check.dry_run:
        return found
    pipeline.graphs.work = True
    pipeline.compile()
    for iterations in (16, 64):
        job = functools.partial(pipeline.sample, [0], iterations=iterations)
        job(), job()
        if not all(any(each.kept.values()) for each in (pipeline.graphs.loops, pipeline.graphs.decodings)):
            raise ValueError("no graph was recorded")
        found[f"student and decoder, batch 1, K = {iterations}, graph"] = check.seconds(job, 10)["median"] * 1000
    return found


# Part: train


class RandomLatents:
    """Latents of no picture, as a data set: what is read and copied has the size of a cache's moments."""

    def __init__(self, config: MARConfig):
        self.config, self.labels = config, torch.zeros(100_000, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Tensor, keys: Tensor) -> Tensor:
        return torch.randn(len(indices), self.config.num_tokens, 2 * self.config.token_dim).half()

    def conditions(self, indices: Tensor, keys: Tensor) -> Tensor:
        return self.labels[indices]

    def tokens(self, stored: Tensor, keys: Tensor, space: Any) -> Tensor:
        return stored.float().chunk(2, dim=-1)[0]


def kernels_of(profiler: profile) -> list[Any]:
    """What a profile says of the card itself: its kernels and copies, without the ranges that torch marks."""
    rows = profiler.key_averages()
    return [row for row in rows if row.device_type != torch.autograd.DeviceType.CPU and not row.is_user_annotation]


def most_expensive(profiler: profile, device: torch.device) -> dict[str, dict[str, float]]:
    """The ten kernels (on a CPU: operations) that took the most time of a profile."""
    key = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    rows = profiler.key_averages() if device.type == "cpu" else kernels_of(profiler)
    rows = sorted(rows, key=lambda row: -getattr(row, key))[:10]
    return {row.key[:80]: {"calls": row.count, "us": getattr(row, key)} for row in rows}


def gsim_steps(check: Check, size: str, batch: int, checkpoint_blocks: bool, compiled: bool = False) -> dict[str, Any]:
    """GSIM updates of a full-size model: time, images a second, what the GPU computes of it, memory.

    Every update masks another number of tokens, those that are timed too, as in a run.
    """
    before = 0 if check.dry_run else torch.cuda.memory_allocated()
    model = full_size(check, size)
    config = random_config(model, OneStep(guidance=1.2))
    settings = dataclasses.replace(
        DistillConfig.imagenet256(size), batch_size=batch, compile=compiled, checkpoint_blocks=checkpoint_blocks
    )  # type: ignore[arg-type]
    student = copy.deepcopy(model).requires_grad_(True)
    student.checkpoint_blocks = checkpoint_blocks
    if compiled:
        compile_blocks(student)
    flops = batch * gsim_flops(model, settings)
    space, workers = token_space(config.space, check.device), Workers(device=check.device)
    held = AnchorLoss(Anchor(model, RandomLatents(model.config), settings), config, space, workers, "teacher")
    ema = model  # the anchor has its own copy
    adam = Optimizer(student, workers, settings.gradient_clip, (0.0, 0.999))
    count = 2 if check.dry_run else 8

    def update(number: int) -> None:
        with fast_products(check.device):
            held.step(student, number, 1.0, student_update=1)  # what an update of distillation computes
            adam.step(1e-6)
            update_ema(ema, student, number, settings.ema_decay)

    for number in range(count):  # warms up
        update(number)
    if not check.dry_run:
        torch.cuda.reset_peak_memory_stats()
    allocations = device_allocations(check)
    taken = [check.once(lambda number=number: update(number)) for number in range(count, 2 * count)]
    median = statistics.median(taken)
    row = {
        "size": size, "batch": batch, "checkpoint_blocks": checkpoint_blocks, "compiled": compiled,
        "seconds of updates": taken, "images/s": batch / median, "TFLOP/s": flops / median / 1e12,
        "share of bf16 peak": flops / median / check.results["peak"]["bf16 TFLOP/s"] / 1e12,
        "reservations of memory an update": (device_allocations(check) - allocations) / count,
    }  # fmt: skip
    if not check.dry_run:
        row |= {"bytes": torch.cuda.max_memory_allocated() - before, "bytes before": before}
        row["bytes reserved"] = torch.cuda.max_memory_reserved()
    middle = count + taken.index(statistics.median_low(taken))
    activities = [ProfilerActivity.CPU] + ([] if check.dry_run else [ProfilerActivity.CUDA])
    with profile(activities=activities, acc_events=True) as profiler:
        update(middle)
        synchronize(check.device)
    kernels = kernels_of(profiler)
    busy = sum(row.self_device_time_total for row in kernels) / 1e6
    row["GPU busy"] = busy / taken[middle - count]  # as the update was timed, without the profiler's own work
    row["launches"] = sum(kernel.count for kernel in kernels)
    return row | {"most expensive": most_expensive(profiler, check.device)}


def device_allocations(check: Check) -> int:
    """How often torch asked the card for memory so far; each time, the host waits."""
    return 0 if check.dry_run else torch.cuda.memory_stats().get("num_device_alloc", 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["correct", "sample", "train"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--sizes", nargs="+", choices=["base", "large", "huge"], default=["base"])
    parser.add_argument("--dry-run", action="store_true", help="tiny models on a CPU")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if not given.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device here: add --dry-run to go through the checks on a CPU")
    check = Check(given.out, given.dry_run)
    check.out.parent.mkdir(parents=True, exist_ok=True)
    ok = [check.run("peak", lambda: peak(check))]
    if "correct" in given.parts:
        for job in (parity, same_pictures, no_waits, graphs, gsim_gradients, tuning_gradients, resume, one_rank):
            ok.append(check.run(job.__name__, lambda job=job: job(check)))
    graph, many = "bf16 graph compiled", 4 if check.dry_run else 128
    if "sample" in given.parts:
        table = [
            ("student", 16, 1, "float32"),
            ("student", 16, 1, "bf16"),
            ("student", 16, 1, "bf16 graph"),
            *(("student", k, 1, graph) for k in (4, 16, 64)),
            ("student", 16, many, "bf16"),
            ("student", 16, many, "bf16 compiled"),
            ("teacher", 16, 1, "bf16"),
            ("teacher", 16, 1, graph),
            ("teacher", 16, many, "bf16 compiled"),
            ("official loop", 16, 1, "bf16 autocast"),
        ]
        if check.dry_run:  # without what takes long
            table = [row for row in table if row[1] < 64 and "compiled" not in row[3]]
        ok.append(check.run("sample base", lambda: sampling_table(check, "base", table)))
        if importlib.util.find_spec("diffusers"):
            ok.append(check.run("decoder", lambda: decoder(check)))
    if "train" in given.parts:
        if not check.dry_run:
            name = "gsim base 64, memory in pieces"  # torch's default
            ok.append(check.run(name, lambda: gsim_steps(check, "base", 64, False)))
            torch._C._accelerator_setAllocatorSettings(GROWING)
            ok.append(check.run("graphs, memory that grows", lambda: graphs(check, teacher=False)))
        steps = [("base", 64, False, False), ("base", 256, True, True), ("base", 64, False, True)]
        steps += [("huge", 64, True, False)] if "huge" in given.sizes else []
        for step in [("base", 4, False, False), ("base", 4, True, False)] if check.dry_run else steps:
            name = f"gsim {step[0]} {step[1]}" + ", recomputed" * step[2] + ", compiled" * step[3]
            ok.append(check.run(name, lambda step=step: gsim_steps(check, *step)))
    larger = [size for size in given.sizes if size != "base" and "sample" in given.parts]
    for size in [] if check.dry_run else larger:
        rows = [("student", 16, 1, graph), ("student", 64, 1, graph), ("student", 16, many, "bf16 compiled")]
        ok.append(check.run(f"sample {size}", lambda size=size, rows=rows: sampling_table(check, size, rows)))
    raise SystemExit(0 if all(ok) else 1)


if __name__ == "__main__":
    main()
