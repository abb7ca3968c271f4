"""Random streams named by what they are for, so that nothing depends on a global state or on what ran before."""

import hashlib
import operator
from collections.abc import Iterable
from typing import Any, SupportsIndex

import torch

Seeds = SupportsIndex | Iterable[SupportsIndex]


def whole_number(value: Any) -> int:
    """Convert an integer of any type (Python's, NumPy's, torch's), but no bool, to Python's own."""
    try:
        if isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool:
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{value!r} is not a whole number") from None


def stream_number(*stream: SupportsIndex | str) -> int:
    """Hash a stream's names and whole numbers to a number of 63 bits."""
    parts = tuple(str(part) if isinstance(part, str) else whole_number(part) for part in stream)
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def generator(*stream: SupportsIndex | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Make a generator seeded by the names and whole numbers in `stream`: `generator(seed, "batch", step)`."""
    return torch.Generator(device).manual_seed(stream_number(*stream))


def image_seeds(seeds: Seeds, count: int) -> list[int]:
    """Return a seed for each of `count` images: the seeds given, or those that count on from a single number.

    Whole numbers of any type and size, also negative ones; NumPy arrays and tensors of up to one dimension.

    Raises:
        ValueError: a seed that is not a whole number, or a wrong number of seeds.
    """
    listed: Any = seeds.tolist() if hasattr(seeds, "tolist") else seeds
    try:
        if isinstance(listed, Iterable):
            numbers = [whole_number(seed) for seed in listed]
        else:
            first = whole_number(listed)
            numbers = list(range(first, first + count))
    except TypeError as error:
        raise ValueError(f"bad seed: {error}; expected one for the first image, or one for each") from None
    if len(numbers) != count:
        raise ValueError(f"{len(numbers)} seeds for {count} images: expected one for each, or a single number")
    return numbers
