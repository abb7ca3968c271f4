"""Speed: seconds per image of models that take turns, the operations that it takes, and the memory."""

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from marval.classes import labels_in_turn
from marval.config import Chain, ModelConfig
from marval.evaluate.models import Models, runs_of
from marval.evaluate.results import Row, Setting, check_rows, merge_results, read_results
from marval.io.files import check_output
from marval.model import MAR
from marval.pipeline import Pipeline
from marval.runtime.progress import progress
from marval.runtime.provenance import made_by
from marval.sampling import DrawTokens, draw_counts, draw_function, run
from marval.sampling.loop import Start
from marval.spaces import Latents

SHORTEST = 0.3  # seconds that a timing lasts at least

Job = Callable[[], Any]


def measure_speed(
    models: Models,
    out: Path,
    *,
    iterations: Sequence[int] = (),
    batches: Sequence[int] = (1,),
    repeats: int = 5,
) -> list[Row]:
    """Time every model at every K and batch size, and keep the rows in `out`, in the place of those at one setting.

    Times are of what `Pipeline.sample` does: pictures decoded and brought to the CPU (`decoded`); of a VAE's decoding
    there is a time apart, too. Tokens alone where
    a model with random weights has no decoder.

    Args:
        iterations: K; each model's own when empty.
        repeats: timed rounds, after one that warms up; 0: that one alone, for rounds of many minutes.

    Raises:
        ValueError: a K that a model has not, or `out` cannot be written or holds figures of other weights under a
            model's name.
    """
    check_output(out, folder=False)
    device, runs = models[0][1].device, runs_of(models, iterations)
    check_rows([row for _, row in runs], read_results(out), "timing", out)
    for batch in dict.fromkeys(batches):
        rows = []
        jobs = [drawing(pipeline, key["iterations"], batch) for pipeline, key in runs]
        for (pipeline, key), rounds in zip(runs, in_turns(jobs, repeats, device), strict=True):
            times, flops = [seconds / batch for seconds in rounds], flops_per_image(pipeline.config, key["iterations"])
            seconds = statistics.median(times)
            rows.append({
                **key, "batch": batch, "decoded": decodes(pipeline), "seconds_per_image": seconds,
                "fastest": min(times), "slowest": max(times), "repeats": len(times), "gflops_per_image": flops / 1e9,
                "made": made_by(device),
            })  # fmt: skip
            if isinstance(pipeline.space, Latents) and decodes(pipeline):
                ((decoding, *_),) = in_turns([decoding_job(pipeline, batch)], min(repeats, 1), device)
                rows[-1]["decoding_seconds_per_image"] = decoding / batch
            if device.type == "cuda":
                rows[-1]["memory_bytes"] = memory_of(pipeline, key["iterations"], batch)
            print(f"{Setting.of(rows[-1])}, batch {batch}: {seconds * 1000:.4g} ms/image")
        merge_results(out, "timing", rows)
    return read_results(out)["timing"]


# The timer


def synchronize(device: torch.device) -> None:
    """Wait for an accelerator; a CPU is always done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds_of(job: Job, device: torch.device) -> float:
    """The wall time of a job."""
    synchronize(device)
    began = time.perf_counter()
    job()
    synchronize(device)
    return time.perf_counter() - began


def in_turns(jobs: Sequence[Job], repeats: int, device: torch.device) -> list[list[float]]:
    """Time each job `repeats` times, round-robin, after a round that warms up; with 0 repeats only that round counts.

    A drifting machine hits all jobs alike. Each time is the mean over at least `SHORTEST` seconds: a single short
    run would time caches that the other jobs emptied.
    """
    times: list[list[float]] = [[] for _ in jobs]
    with progress((repeats + 1) * len(jobs), "timing") as advance:
        for repeat in range(repeats + 1):
            for job, own in zip(jobs, times, strict=True):
                taken = [seconds_of(job, device)]
                while sum(taken) < SHORTEST:
                    taken.append(seconds_of(job, device))
                if repeat > 0 or repeats == 0:
                    own.append(sum(taken) / len(taken))
                advance(1)
    return times


def drawing(pipeline: Pipeline, iterations: int, batch: int) -> Job:
    """The job that is timed: draw a batch of pictures as users do."""
    labels = labels_in_turn(range(batch), pipeline.config)

    def draw() -> None:
        if decodes(pipeline):
            pipeline.sample(labels, iterations=iterations, batch_size=batch)
        else:
            pipeline.sample_tokens(labels, seeds=range(batch), iterations=iterations).cpu()

    return draw


def decoding_job(pipeline: Pipeline, batch: int) -> Job:
    """The job of decoding a batch of tokens."""
    mar = pipeline.config.mar
    tokens = torch.zeros(batch, mar.num_tokens, mar.token_dim, device=pipeline.device)
    return torch.inference_mode()(lambda: pipeline.decode(tokens).cpu())


def decodes(pipeline: Pipeline) -> bool:
    """Tell whether tokens can become pictures: a full-size model with random weights has no VAE."""
    return getattr(pipeline.config.space, "vae", "") != "none"


# The memory and the operations


def memory_of(pipeline: Pipeline, iterations: int, batch: int) -> int:
    """Bytes of the weights and, at the peak of drawing a batch, of all that CUDA's allocator holds besides."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in pipeline.model.parameters())
    torch.cuda.reset_peak_memory_stats(pipeline.device)
    before = torch.cuda.memory_allocated(pipeline.device)  # these weights, and other models'
    drawing(pipeline, iterations, batch)()
    return weights + torch.cuda.max_memory_allocated(pipeline.device) - before


def flops_per_image(config: ModelConfig, iterations: int) -> int:
    """Floating-point operations (2 per multiply-add) of matrix products and attention for one image, as torch counts.

    A few small counts give the whole sum: an iteration's operations grow with the square of the visible tokens (in
    attention) and linearly with the drawn tokens, a chain's linearly with its steps.
    """
    draw, counts = config.draw, draw_counts(config.mar.num_tokens, iterations)
    if config.mar.cached:
        return cached_flops(config, counts)
    if isinstance(draw, Chain) and draw.diffusion_steps > 3:
        short = [dataclasses.replace(config, draw=dataclasses.replace(draw, diffusion_steps=t)) for t in (2, 3)]
        two, three = (flops_per_image(one, iterations) for one in short)
        return two + (draw.diffusion_steps - 2) * (three - two)
    constant, line, square, each, once = iteration_costs(config)
    visible = [sum(counts[:k]) for k in range(iterations)]
    return once + sum(constant + line * v + square * v**2 + each * n for v, n in zip(visible, counts, strict=True))


@functools.cache
def iteration_costs(config: ModelConfig) -> tuple[int, int, int, int, int]:
    """Fit an AR iteration's operations: a constant, and factors of visible tokens, their square, and drawn tokens.

    The last number is of what an image needs once: its time steps' embeddings.
    """
    draw_tokens = draw_function(config)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):  # tensors with shapes alone
        model = MAR(config.mar).eval()
        with FlopCounterMode(display=False) as counter:
            draw_tokens.bind(model.head)
        once = counter.get_total_flops()
        none, one, two, more = (iteration_flops(model, draw_tokens, v, n) for v, n in ((0, 1), (1, 1), (2, 1), (0, 2)))
    square, each = (two - 2 * one + none) // 2, more - none
    return none - each - once, one - none - square, square, each, once


@functools.cache
def cached_costs(config: ModelConfig) -> tuple[int, int, int, int, int, int]:
    """Fit the operations of an image's first AR iteration, by a network with a cache.

    For v known tokens and n drawn ones they are c + r v + q n + a v^2 + b n^2 + d v n.
    """
    draw_tokens = draw_function(config)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        model = MAR(config.mar).eval()
        tried = (0, 1), (1, 1), (2, 1), (0, 2), (1, 2), (0, 3)
        f = {(v, n): iteration_flops(model, draw_tokens, v, n) for v, n in tried}
    a, b = (f[2, 1] - 2 * f[1, 1] + f[0, 1]) // 2, (f[0, 3] - 2 * f[0, 2] + f[0, 1]) // 2
    d = f[1, 2] - f[0, 2] - f[1, 1] + f[0, 1]
    r, q = f[1, 1] - f[0, 1] - a - d, f[0, 2] - f[0, 1] - 3 * b
    return f[0, 1] - q - b, r, q, a, b, d


def cached_flops(config: ModelConfig, counts: list[int]) -> int:
    """Operations of an image by a network with a cache: its first iteration reads the buffer, each what is new.

    In attention, new tokens meet those that were read before as they meet each other.
    """
    c, r, q, a, b, d = cached_costs(config)
    before = config.mar.buffer_size
    own, each = r - 2 * a * before, q - d * before  # by layers that see one token alone
    flops = c + q * counts[0] + b * counts[0] ** 2
    for new, n in itertools.pairwise(counts):
        flops += own * new + each * n + a * new * (before + new) + b * n * (before + n) + d * new * n
        before += new
    return flops


def iteration_flops(model: MAR, draw_tokens: DrawTokens, visible: int, drawn: int) -> int:
    """Count the operations of one AR iteration that draws `drawn` tokens with `visible` ones known."""
    mar = model.config
    tokens = torch.zeros(1, mar.num_tokens, mar.token_dim)
    noise = torch.zeros(draw_tokens.noise_draws, *tokens.shape)
    start = Start(tokens, torch.arange(mar.num_tokens)[None], visible, [drawn], noise)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        list(run(model, draw_tokens, model.embed(torch.zeros(1, dtype=torch.long)), start))
    return counter.get_total_flops()
