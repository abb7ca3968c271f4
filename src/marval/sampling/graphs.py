"""CUDA graphs of the AR loop and of a VAE's decoder: the host launches them whole, where it is slower than the GPU.

One picture of MAR-B's student (K = 16, bf16) took an H200 115 ms launch by launch, and 27 ms as a graph.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed.tensor import DTensor

from marval.model import MAR
from marval.sampling.draw import DrawTokens
from marval.sampling.loop import Start, run

LARGEST_INPUT = 2**22  # numbers in the decoder's input, up to which a GPU waits for its host (MAR-B: 17 images)
MOST_CALLS = 1600  # of the head: a graph of more takes long to record, and much memory
LARGEST_DECODED = 2**14  # numbers in the tokens that a decoder gets, likewise (4 images of 256 x 256)
MOST_GRAPHS = 8  # of loops that are kept, and as many of decodings; each holds its activations

R = TypeVar("R")


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


class Decoding:
    """A decoder for tokens of one form, which are copied to where the graph reads them."""

    def __init__(self, decode: Callable[[Tensor], Tensor], tokens: Float[Tensor, "b l d"], pool: Any):
        self.tokens = tokens.clone()
        self.replay, (self.images,) = record(lambda: [decode(self.tokens)], pool)

    def __call__(self, tokens: Float[Tensor, "b l d"]) -> Float[Tensor, "b c h w"]:
        """Decode tokens."""
        self.tokens.copy_(tokens)
        self.replay()
        return self.images.clone()


class Recordings:
    """Recordings that read the same weights, by the form of their inputs; the one that was used last stays longest.

    The first call with inputs of a form finds none (and compiles what is compiled), the second records. Changes of the
    weights in place are seen; when they move (to another precision, say), the recordings go.
    """

    def __init__(self) -> None:
        self.kept: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self.weights: list[Tensor] = []  # that the recordings read
        self.pool: Any = None

    def find(self, form: tuple[Any, ...], weights: Iterable[Tensor], make: Callable[[Any], R]) -> R | None:
        """Return the recording for inputs of this form; None at their first call."""
        now = [weight.detach() for weight in weights]
        if [x.data_ptr() for x in now] != [x.data_ptr() for x in self.weights]:
            self.kept.clear()
            self.weights = now
        first = form not in self.kept
        recording = self.kept.pop(form, None)
        if recording is None and not first:
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            recording = make(self.pool)
        self.kept[form] = recording
        if len(self.kept) > MOST_GRAPHS:
            self.kept.popitem(last=False)
        return recording


class Graphs:
    """The recordings of one model and its decoder."""

    def __init__(self) -> None:
        self.loops, self.decodings = Recordings(), Recordings()
        self.work = True  # set False, everything is drawn launch by launch

    def forget(self) -> None:
        """Drop all recordings, as when other kernels are to be recorded."""
        self.loops, self.decodings = Recordings(), Recordings()

    def run(
        self, model: MAR, draw: DrawTokens, condition: Float[Tensor, "b d"], start: Start
    ) -> Iterator[tuple[Float[Tensor, "b l c"], Int[Tensor, "b v"]]]:
        """`marval.sampling.run`, by a graph where that is faster."""
        config = model.config
        numbers = len(start.tokens) * (config.buffer_size + config.num_tokens) * config.decoder_dim
        few = numbers <= LARGEST_INPUT and len(start.counts) * draw.noise_draws <= MOST_CALLS
        few = few and not isinstance(model.mask_token, DTensor)  # of shards, nobody knows where the weights will be
        form = (draw.config, len(condition), start.known, *start.counts)
        recording = self.find(
            self.loops, few, start.tokens, form, model.parameters(),
            lambda pool: Recording(model, draw, condition, start, pool),
        )  # fmt: skip
        return run(model, draw, condition, start) if recording is None else recording(condition, start)

    def decode(
        self, decode: Callable[[Tensor], Tensor], weights: Iterable[Tensor], tokens: Float[Tensor, "b l d"]
    ) -> Float[Tensor, "b c h w"]:
        """`decode(tokens)`, which reads `weights`, by a graph where that is faster."""
        recording = self.find(
            self.decodings, tokens.numel() <= LARGEST_DECODED, tokens, (*tokens.shape,), weights,
            lambda pool: Decoding(decode, tokens, pool),
        )  # fmt: skip
        return decode(tokens) if recording is None else recording(tokens)

    def find(
        self, recordings: Recordings, few: bool, tokens: Tensor, form: tuple[Any, ...], weights: Iterable[Tensor],
        make: Callable[[Any], R],
    ) -> R | None:  # fmt: skip
        """Return a recording where one serves; None where launches do, and where none can be made."""
        if not (few and self.serve(tokens)):
            return None
        try:
            return recordings.find((torch.is_autocast_enabled(tokens.device.type), *form), weights, make)
        except RuntimeError as error:
            self.work = False
            warnings.warn(f"no CUDA graph of this model: {error}; it draws launch by launch", stacklevel=3)
            return None

    def serve(self, tokens: Tensor) -> bool:
        """Tell whether graphs can be recorded of work on such tokens."""
        return self.work and tokens.is_cuda and torch.is_inference_mode_enabled()
