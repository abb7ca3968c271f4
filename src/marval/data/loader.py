"""The batches of a training: read ahead in a thread, while the device computes."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from marval.data.images import batch_indices
from marval.data.load import TrainingData
from marval.presets import RunConfig
from marval.runtime.distributed import Workers
from marval.runtime.philox import stream_keys
from marval.spaces import TokenSpace

Batches = Callable[[int], Iterable[tuple[slice, Tensor, Tensor]]]  # an update's parts, as `Loader` yields them
Read = tuple[Tensor, Tensor, Tensor]  # a process's rows of a batch as they are stored, their conditions and keys


class Loader:
    """Loads a process's parts of every batch, as tokens on its device."""

    def __init__(self, data: TrainingData, settings: RunConfig, space: TokenSpace, workers: Workers):
        self.data, self.batch_size, self.seed = data, settings.batch_size, settings.seed
        self.space, self.device = space, workers.device
        self.parts = workers.parts(settings.batch_size, settings.accumulate)
        self.own = slice(self.parts[0].start, self.parts[-1].stop)
        self.pool = ThreadPoolExecutor(1)
        self.ahead: dict[int, Future[Read]] = {}

    def __call__(self, update: int) -> Iterator[tuple[slice, Float[Tensor, "b l c"], Shaped[Tensor, "b *f"]]]:
        """Yield the parts of an update's batch: the rows, their tokens, and what `MAR.embed` takes of them."""
        reading = self.ahead.pop(update, None) or self.pool.submit(self.read, update)
        self.ahead = {update + 1: self.pool.submit(self.read, update + 1)}
        stored, given, keys = (x.to(self.device, non_blocking=True) for x in reading.result())
        for rows in self.parts:
            part = slice(rows.start - self.own.start, rows.stop - self.own.start)
            yield rows, self.data.tokens(stored[part], keys[part], self.space), given[part]

    def read(self, update: int) -> Read:
        """Read this process's rows of a batch into memory, from which a GPU copies without waiting."""
        indices = batch_indices(len(self.data), self.batch_size, update, self.seed)[self.own]
        streams = stream_keys([(self.seed, "data", update), (self.seed, "captions", update)])
        keys, own = streams[:, None] + torch.arange(self.own.start, self.own.stop)
        read = self.data.read(indices, keys), self.data.conditions(indices, own), keys
        return tuple(x.pin_memory() for x in read) if self.device.type == "cuda" else read  # type: ignore[return-value]
