"""`marval bench`: how fast models draw, against what their arithmetic and the machine allow."""

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from marval.config import Chain, LatentSpace, MARConfig, ModelConfig, OneStep, Schedule, Size
from marval.evaluate.evaluate import iterations_of
from marval.evaluate.flops import context_flops, head_flops, model_flops
from marval.evaluate.results import merge_results, named
from marval.evaluate.throughput import memory_of
from marval.evaluate.timing import drawing, in_turns, seconds_of, timed_row
from marval.model import MAR, TokenHead
from marval.pipeline import Pipeline
from marval.runtime.rng import generator
from marval.sampling import draw_counts, draw_function
from marval.sampling.fast import linear

PEAK_SIDE = 2048  # of the square matrices whose product is the machine's peak


@dataclass(frozen=True)
class DrawNothing:
    """Draws zeros in the place of a way to draw: the time left is the context network's and the loop's."""

    noise_draws: int
    guidance: float
    guidance_schedule: Schedule

    def __call__(
        self,
        head: TokenHead,
        context: Float[Tensor, "n d"],
        null_context: Float[Tensor, "n d"] | None,
        guidance: float,
        noise: Float[Tensor, "s n c"],
    ) -> Float[Tensor, "n c"]:
        return torch.zeros_like(noise[0])


def random_pair(size: Size, device: str) -> list[Pipeline]:
    """A full-size teacher (T = 100, w = 3, linear) and its student, with the same random weights."""
    mar = MARConfig.imagenet256(size)
    model = MAR(mar).initialize(generator(0, "bench")).to(device).eval().requires_grad_(False)
    space, names = LatentSpace((256, 256), "none"), tuple(map(str, range(mar.num_classes)))
    draws: dict[str, Chain | OneStep] = {"teacher": Chain(guidance=3.0), "student": OneStep()}
    return [
        Pipeline(model, ModelConfig(mar, space, draw, names, 64, f"imagenet256-{size}-{role}"))
        for role, draw in draws.items()
    ]


@torch.inference_mode()
def peak_flops(device: torch.device, autocast: bool, repeats: int = 7) -> float:
    """The machine's floating-point operations a second in a large matrix product, the best of a few tries."""
    dtype = torch.bfloat16 if autocast else torch.float32
    side = PEAK_SIDE if device.type == "cpu" else 4 * PEAK_SIDE  # long against the launch
    x, w = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    jobs: list[Callable[[], Tensor]] = [lambda: linear(x, w, None), lambda: x @ w]
    best = min(seconds_of(job, device) for _ in range(repeats) for job in jobs)
    return 2 * side**3 / best


def savings(config: MARConfig, iterations: int) -> dict[str, float]:
    """The share of one student's image that each saving leaves out, of what a sampler without it would do."""
    counts = draw_counts(config.num_tokens, iterations)
    shown = [sum(counts[:k]) for k in range(iterations)]
    ours = sum(context_flops(config, v, q) for v, q in zip(shown, counts, strict=True))
    head = sum(head_flops(config, q) for q in counts)
    everything_encoded = sum(context_flops(config, config.num_tokens, q) for q in counts)
    everywhere = sum(context_flops(config, v, config.num_tokens) for v in shown)
    every_token = iterations * head_flops(config, config.num_tokens)
    return {
        "encoder sees visible tokens only": 1 - (ours + head) / (everything_encoded + head),
        "last block computes drawn tokens only": 1 - (ours + head) / (everywhere + head),
        "head computes drawn tokens only": 1 - (ours + head) / (ours + every_token),
    }


def bench(
    pipelines: Sequence[Pipeline],
    *,
    iterations: Sequence[int],
    batches: Sequence[int],
    repeats: int,
    out: Path,
    hashes: Sequence[str] = (),
    autocast: bool = False,
    compiled: bool = False,
    report: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Time every model at every K and batch size, in turn, so that a drifting machine hits all alike.

    Rows hold seconds per image (median, fastest, slowest; `decoded` says whether they end with pictures or with
    tokens), the context network's seconds, operations, their rate, the fraction of the machine's peak, and memory;
    with a teacher first, also the speed-up over it at the same K, and the one that operations alone allow. They
    replace those of `out` at the same setting.

    Args:
        hashes: SHA-256 of every model's weights; without, they are random: rows say no hash and measure no memory.
    """
    device = pipelines[0].device
    if compiled:
        pipelines = compiled_copies(pipelines)
    peak = peak_flops(device, autocast)
    report(f"peak of this machine ({device.type}, {'bf16' if autocast else 'float32'}): {peak / 1e9:.0f} GFLOP/s")
    wanted = [iterations_of(pipeline, iterations) for pipeline in pipelines]
    runs = [(k, i) for k in dict.fromkeys(k for ks in wanted for k in ks) for i, ks in enumerate(wanted) if k in ks]
    every: list[dict[str, Any]] = []
    for batch in dict.fromkeys(batches):
        rows: list[dict[str, Any]] = []
        jobs = []
        for k, i in runs:
            draw = draw_function(pipelines[i].config)
            nothing = DrawNothing(draw.noise_draws, draw.guidance, draw.guidance_schedule)
            jobs += [drawing(pipelines[i], k, batch, autocast=autocast, draw=one) for one in (None, nothing)]
        times = in_turns(jobs, repeats, device)
        for (k, i), whole, contexts in zip(runs, times[::2], times[1::2], strict=True):
            timed = timed_row(pipelines[i], k, batch, whole, autocast=autocast)
            row = {**_row(timed, pipelines[i], contexts, peak), "compiled": compiled}
            if hashes:
                row["sha256"] = hashes[i]
                if not compiled:
                    row["memory_bytes"] = memory_of(pipelines[i], k, batch, autocast)
            teacher = next((r for r in rows if r["teacher"] and r["iterations"] == k), None)
            if teacher is not None and not row["teacher"]:
                row["speed_up"] = teacher["seconds_per_image"] / row["seconds_per_image"]
                row["speed_up_by_flops"] = teacher["gflops_per_image"] / row["gflops_per_image"]
            rows.append(row)
            report(_line(row))
        merge_results(out, "bench", rows)
        every += rows
    for k in dict.fromkeys(k for k, _ in runs):
        for saving, share in savings(pipelines[0].config.mar, k).items():
            report(f"K={k}: {saving}: {share:.0%} less to compute for a student")
    return every


def _row(timed: dict[str, Any], pipeline: Pipeline, contexts: list[float], peak: float) -> dict[str, Any]:
    cost = model_flops(pipeline.config, draw_counts(pipeline.config.mar.num_tokens, timed["iterations"]))
    seconds = timed["seconds_per_image"]
    return {
        **timed,
        "context_seconds": statistics.median(contexts) / timed["batch"],
        "gflops_per_image": cost.total / 1e9,
        "context_gflops": cost.context / 1e9,
        "gflops_per_second": cost.total / seconds / 1e9,
        "peak_gflops_per_second": peak / 1e9,
        "fraction_of_peak": cost.total / seconds / peak,
        "device": pipeline.device.type,
    }


def _line(row: dict[str, Any]) -> str:
    seconds, context = row["seconds_per_image"], row["context_seconds"]
    line = (
        f"{named(row)}, batch {row['batch']}: {seconds:.4g} s/image "
        f"({row['fastest']:.4g} to {row['slowest']:.4g}; context {context / seconds:.0%}), "
        f"{row['gflops_per_image']:.4g} GFLOP, {row['fraction_of_peak']:.0%} of the peak"
    )
    if "speed_up" in row:
        line += f", {row['speed_up']:.1f}x the teacher ({row['speed_up_by_flops']:.1f}x by arithmetic alone)"
    return line


def compiled_copies(pipelines: Sequence[Pipeline]) -> list[Pipeline]:
    """The pipelines with compiled networks; the caller's own stay as they are."""
    copies = {id(p.model): copy.deepcopy(p.model) for p in pipelines}
    for model in copies.values():
        for block in [*model.encoder_blocks, *model.decoder_blocks]:  # one compilation serves all of a kind
            block.compile(dynamic=True)
        model.head.denoise = torch.compile(model.head.denoise, dynamic=True)  # type: ignore[method-assign]
    return [Pipeline(copies[id(p.model)], p.config, p.space) for p in pipelines]


def largest_batch(pipeline: Pipeline, iterations: int, autocast: bool, most: int = 1024) -> int:
    """The largest power of two that fits in an accelerator's memory."""
    batch = 1
    while batch < most:
        try:
            drawing(pipeline, iterations, 2 * batch, autocast=autocast)()
        except torch.OutOfMemoryError:
            break
        batch *= 2
    return batch
