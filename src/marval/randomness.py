"""Random streams named by what they are for, so that nothing depends on a global state or on what ran before."""

import hashlib

import torch


def generator(*stream: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by the names and numbers in `stream`, for example `generator(seed, "batch", step)`."""
    digest = hashlib.blake2b(repr(stream).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
