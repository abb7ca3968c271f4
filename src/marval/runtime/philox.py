"""Random numbers that are computed from where they are used: the same on every device, alone and in any batch.

Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") enciphers a counter with a key. Each
image has a key of its own, made of its seed, and each of its numbers a counter.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from marval.runtime.rng import stream_number

ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85
LOW = 0xFFFFFFFF  # the lower half of 64 bits; torch has no arithmetic for unsigned 32-bit integers
TOGETHER = 2**22  # counters enciphered at a time: a few hundred MB


def stream_keys(streams: Iterable[Sequence[int | str]], device: torch.device | str = "cpu") -> Int[Tensor, " b"]:
    """Make a key of each stream's names and whole numbers, such as (seed, "image")."""
    return torch.tensor([stream_number(*stream) for stream in streams]).to(device, non_blocking=True)


def philox(counter: Sequence[Int[Tensor, "..."]], key: Sequence[Int[Tensor, "..."]]) -> tuple[Tensor, ...]:
    """Encipher counters of four words with keys of two words (all of 32 bits, in int64): four random words each."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        low, high = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # 64 bits; shifts bring the sign along
        c0, c1, c2, c3 = (high >> 32 & LOW) ^ c1 ^ k0, high & LOW, (low >> 32 & LOW) ^ c3 ^ k1, low & LOW
        k0, k1 = k0 + KEY_STEPS[0] & LOW, k1 + KEY_STEPS[1] & LOW
    return c0, c1, c2, c3


def random_words(keys: Int[Tensor, " b"], count: int) -> Int[Tensor, "b n"]:
    """Draw `count` words for each key, uniform in [0, 2^32)."""
    return torch.cat([torch.stack(words, dim=-1).flatten(1) for words in _blocks(keys, count)], dim=1)[:, :count]


def standard_normal(keys: Int[Tensor, " b"], shape: Sequence[int]) -> Float[Tensor, "b *shape"]:
    """Draw Gaussian numbers of this shape for each key (Box and Muller 1958), in float32.

    A longer first dimension leaves the numbers before as they are. The integers are the same on every device; their
    logarithms and cosines may differ in the last bit.
    """
    count, parts = math.prod(shape), []
    for words in _blocks(keys, count):
        u = [(word.float() + 0.5) * 2.0**-32 for word in words]  # in (0, 1]
        radius = [(-2 * u[i].log()).sqrt() for i in (0, 2)]
        angle = [2 * math.pi * u[i] for i in (1, 3)]
        normal = [f(a) * r for r, a in zip(radius, angle, strict=True) for f in (torch.cos, torch.sin)]
        parts.append(torch.stack(normal, dim=-1).flatten(1))
    return torch.cat(parts, dim=1)[:, :count].unflatten(1, tuple(shape))


def _blocks(keys: Int[Tensor, " b"], count: int) -> Iterator[tuple[Tensor, ...]]:
    """Encipher the counters 0, 1, ... of `count` words for each key, a block of counters at a time."""
    halves, zero = (keys[:, None] & LOW, keys[:, None] >> 32 & LOW), torch.zeros_like(keys[:, None])
    counters, block = -(-count // 4), max(1, TOGETHER // max(1, len(keys)))
    for start in range(0, counters, block):
        some = torch.arange(start, min(start + block, counters), device=keys.device)
        yield philox((some.expand(len(keys), -1), zero, zero, zero), halves)
