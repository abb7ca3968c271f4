"""CUDA graphs of the AR loop: the host launches all K iterations at once, where it would be slower than the GPU.

One picture of MAR-B's student (K = 16, bf16) took an H100 101 ms launch by launch, and 23 ms as a graph.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from marval.model import MAR
from marval.sampling.draw import DrawTokens
from marval.sampling.loop import Start, run

LARGEST_INPUT = 2**22  # numbers in the decoder's input, up to which a GPU waits for its host (MAR-B: 17 images)
MOST_CALLS = 1600  # of the head: a graph of more takes long to record, and much memory
MOST_GRAPHS = 8  # that are kept; each holds its loop's activations


def record(job: Callable[[], list[Tensor]], pool: Any) -> tuple[Callable[[], None], list[Tensor]]:
    """Record what a job launches on the GPU; return a function that does it again, and its static results."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        results = job()
    return graph.replay, results


class Recording:
    """The AR loop for inputs of one form, which are copied to where the graph reads them.

    A graph reads memory by its place, so whatever it reads must stay: the inputs, the draw's tensors, the weights.
    """

    def __init__(self, model: MAR, draw: DrawTokens, condition: Float[Tensor, "b d"], start: Start, pool: Any):
        self.draw = draw
        self.inputs = [each.clone() for each in (condition, start.tokens, start.order, start.noise)]
        condition, tokens, order, noise = self.inputs
        static = Start(tokens, order, start.known, start.counts, noise)
        self.replay, self.drawn = record(lambda: [x for x, _ in run(model, draw, condition, static)], pool)

    def __call__(
        self, condition: Float[Tensor, "b d"], start: Start
    ) -> Iterator[tuple[Float[Tensor, "b l c"], Int[Tensor, "b v"]]]:
        """Draw all iterations' tokens, and yield what `run` does."""
        for static, given in zip(self.inputs, (condition, start.tokens, start.order, start.noise), strict=True):
            static.copy_(given)
        self.replay()
        shown = start.known
        for tokens, count in zip(self.drawn, start.counts, strict=True):
            shown += count
            yield tokens.clone(), start.order[:, :shown]


class Graphs:
    """The recordings of one model; those that were not used for the longest time are dropped.

    The first call with inputs of a form draws launch by launch (and compiles what is compiled), the second records.
    Changes of the weights in place are seen; when they move (to another precision, say), the recordings go.
    """

    def __init__(self) -> None:
        self.recordings: OrderedDict[tuple[Any, ...], Recording | None] = OrderedDict()
        self.weights: list[Tensor] = []  # that the recordings read
        self.pool: Any = None
        self.work = True  # set False, everything is drawn launch by launch

    def run(
        self, model: MAR, draw: DrawTokens, condition: Float[Tensor, "b d"], start: Start
    ) -> Iterator[tuple[Float[Tensor, "b l c"], Int[Tensor, "b v"]]]:
        """`marval.sampling.run`, by a graph where that is faster."""
        recording = self.recording_for(model, draw, condition, start) if self.serve(model, draw, start) else None
        return run(model, draw, condition, start) if recording is None else recording(condition, start)

    def serve(self, model: MAR, draw: DrawTokens, start: Start) -> bool:
        """Tell whether a graph draws such images, and faster than launches one by one."""
        config = model.config
        numbers = len(start.tokens) * (config.buffer_size + config.num_tokens) * config.decoder_dim
        few = numbers <= LARGEST_INPUT and len(start.counts) * draw.noise_draws <= MOST_CALLS
        return self.work and start.tokens.is_cuda and torch.is_inference_mode_enabled() and few

    def recording_for(
        self, model: MAR, draw: DrawTokens, condition: Float[Tensor, "b d"], start: Start
    ) -> Recording | None:
        """Return the recording for inputs of this form; None at their first call, and where none can be made."""
        weights = [parameter.detach() for parameter in model.parameters()]
        if [x.data_ptr() for x in weights] != [x.data_ptr() for x in self.weights]:
            self.recordings.clear()
            self.weights = weights
        autocast = torch.is_autocast_enabled(start.tokens.device.type)
        key = (draw.config, autocast, len(condition), start.known, *start.counts)
        first = key not in self.recordings
        recording = self.recordings.pop(key, None)
        if recording is None and not first:
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            try:
                recording = Recording(model, draw, condition, start, self.pool)
            except RuntimeError as error:
                self.work = False
                warnings.warn(f"no CUDA graph of this model: {error}; it draws launch by launch", stacklevel=2)
                return None
        self.recordings[key] = recording
        if len(self.recordings) > MOST_GRAPHS:
            self.recordings.popitem(last=False)
        return recording
