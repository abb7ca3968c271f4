"""What `marval bench` finds besides times: the batch size of the highest throughput, memory, and a summary."""

from collections.abc import Callable, Sequence

import torch

from marval.evaluate.memory import LiveMemory
from marval.evaluate.results import Row, markdown
from marval.evaluate.timing import drawing, seconds_of
from marval.pipeline import Pipeline

LONGEST = 20.0  # seconds that a run may take while the best batch is sought
GAIN = 1.05  # a larger batch must draw this much more in a second, to be worth it
GROWTH = 4


def best_batch(seconds: Callable[[int], float], most: int = 1024) -> int:
    """The batch size, of 1, 4, 16 and so on, from which a larger one gains less than 5 %.

    Args:
        seconds: the time of one batch of a size.
    """
    batch, taken = 1, seconds(1)
    while batch * GROWTH <= most and taken * GROWTH <= LONGEST:
        try:
            larger = seconds(batch * GROWTH)
        except torch.OutOfMemoryError:
            break
        if batch * GROWTH / larger < GAIN * batch / taken:
            break
        batch, taken = batch * GROWTH, larger
    return batch


def worthwhile_batches(pipelines: Sequence[Pipeline], iterations: Sequence[int], autocast: bool) -> tuple[int, ...]:
    """Batch sizes to time: 1, and each model's most efficient one, at its K; at most 1,024, on a CPU 64."""
    found, most = {1}, 64 if pipelines[0].device.type == "cpu" else 1024
    for pipeline, k in zip(pipelines, iterations, strict=True):

        def seconds(batch: int, pipeline: Pipeline = pipeline, k: int = k) -> float:
            drawing(pipeline, k, min(batch, 2), autocast=autocast)()  # warm-up
            return seconds_of(drawing(pipeline, k, batch, autocast=autocast), pipeline.device)

        found.add(best_batch(seconds, most))
    return tuple(sorted(found))


def memory_of(pipeline: Pipeline, iterations: int, batch: int, autocast: bool) -> int:
    """Bytes of the weights and, at the peak of drawing a batch, of all tensors made on the way.

    On CUDA as its allocator counts them; else by watching every tensor.
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in pipeline.model.parameters())
    draw = drawing(pipeline, iterations, batch, autocast=autocast)
    if pipeline.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(pipeline.device)
        before = torch.cuda.memory_allocated(pipeline.device)  # these weights, and other models'
        draw()
        return weights + torch.cuda.max_memory_allocated(pipeline.device) - before
    with LiveMemory() as live:
        draw()
    return weights + live.peak


def summary(rows: Sequence[Row]) -> str:
    """In Markdown, for every (model, T, w, K): latency at the smallest batch, and throughput at the best."""
    settings: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        chain = row["draw"]
        key: tuple[object, ...] = (
            row["model"],
            chain.get("diffusion_steps", ""),
            chain.get("guidance", ""),
            row["iterations"],
        )
        settings.setdefault(key, []).append(row)
    smallest = min(row["batch"] for row in rows)
    header = ["model", "T", "w", "K", f"ms / image, batch {smallest}", "images / s (batch)", "GFLOP / image", "MiB"]
    header += ["of the peak"]
    lines = []
    for key, group in settings.items():
        alone = min(group, key=lambda row: row["batch"])
        best = min(group, key=lambda row: row["seconds_per_image"])
        memory = f"{best['memory_bytes'] / 2**20:.4g}" if "memory_bytes" in best else ""
        span = f"{alone['fastest'] * 1000:.4g} to {alone['slowest'] * 1000:.4g}"
        lines.append(
            [*map(str, key), f"{alone['seconds_per_image'] * 1000:.4g} ({span})",
             f"{1 / best['seconds_per_image']:.4g} ({best['batch']})", f"{best['gflops_per_image']:.4g}", memory,
             f"{best['fraction_of_peak']:.0%}"]
        )  # fmt: skip
    return markdown(header, lines)
