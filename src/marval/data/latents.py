"""Caches of a VAE's latents, as a training reads them: the posterior's moments of images and their mirrors.

A cache is a folder with `plan.json` (what is cached: the VAE by its weights, the images by their names, sizes and
times), `shard-00000.safetensors` and so on (each written whole, so that a killed run goes on where it was), and
`index.json`, written last.
"""

import bisect
import json
import math
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor

from marval.data.captions import Captions
from marval.runtime.philox import random_words, standard_normal
from marval.spaces import Latents, TokenSpace

PLAN, INDEX = "plan.json", "index.json"
MEASURED = 1000  # images whose range is measured


@dataclass(frozen=True)
class LatentData:
    """A finished cache; its shards are memory-mapped."""

    folder: Path
    labels: Int[Tensor, " n"]
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]  # channels, rows, columns of a latent
    starts: tuple[int, ...]  # each shard's first image
    scale: float  # 1 / standard deviation of the latents
    image_size: int
    vae: str
    vae_sha256: str = ""
    captions: Captions | None = None
    mirrors: bool = True  # it has them
    _mapped: dict[int, Any] = field(default_factory=dict, init=False, repr=False, compare=False)  # shards in use

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def open(cls, folder: Path, encoder: str = "") -> "LatentData":
        """Open a cache that `cache_latents` finished; with its captions where their sentence `encoder` is named."""
        try:
            index = json.loads((folder / INDEX).read_text())
            starts = (0, *accumulate(index["counts"][:-1]))
            return cls(
                folder, torch.tensor(index["labels"]), tuple(index["class_names"]), tuple(index["shape"]),
                starts, index["scale"], index["image_size"], index["vae"], index.get("vae_sha256", ""),
                Captions.from_dict(index["captions"], encoder) if encoder and index.get("captions") else None,
                index.get("mirrors", True),
            )  # fmt: skip
        except FileNotFoundError:
            kind = "an unfinished" if (folder / PLAN).is_file() else "no"
            raise ValueError(f"{folder} is {kind} cache of latents: run marval cache") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / INDEX} is damaged ({error}): remove it and run marval cache") from None

    def conditions(self, indices: Int[Tensor, " b"], keys: Int[Tensor, " b"]) -> Shaped[Tensor, "b *f"]:
        """Return what networks embed: the images' labels or, of each, one of its captions, drawn by its key."""
        return self.labels[indices] if self.captions is None else self.captions.draw(indices, keys)

    def read(self, indices: Int[Tensor, " b"], keys: Int[Tensor, " b"]) -> Float[Tensor, "b c2 h w"]:
        """Read the posterior's moments of each image or, if its key says so, of its mirror, in half precision."""
        mirrored = (random_words(~keys, 1)[:, 0] & int(self.mirrors)).tolist()
        return torch.stack([self.moments(i, side) for i, side in zip(indices.tolist(), mirrored, strict=True)])

    def tokens(
        self, stored: Float[Tensor, "b c2 h w"], keys: Int[Tensor, " b"], space: TokenSpace
    ) -> Float[Tensor, "b l d"]:
        """Draw tokens from the posteriors that `read` gave, with the noise of each one's key, on their device."""
        if not isinstance(space, Latents):
            raise ValueError("a cache of latents needs a model that draws latents")
        mean, log_variance = stored.float().chunk(2, dim=1)
        noise = standard_normal(keys, mean.shape[1:])
        return space.tokens(mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise)

    def limit(self) -> float:
        """How far from 0 tokens are, at most; measured on some of the images, and rounded up."""
        count = min(len(self), MEASURED)
        means = [self.moments(i * len(self) // count, 0).chunk(2)[0] for i in range(count)]
        return math.ceil(10 * self.scale * float(torch.stack(means).abs().max())) / 10

    def moments(self, index: int, side: int | slice = slice(None)) -> Float[Tensor, "*sides c2 h w"]:
        """Read mean and log-variance (stacked in the channels) of an image (side 0), of its mirror (1), or of both."""
        shard = bisect.bisect_right(self.starts, index) - 1
        if shard not in self._mapped:
            file = shard_file(self.folder, shard)
            try:
                self._mapped[shard] = safe_open(file, framework="pt").get_slice("moments")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} is damaged ({error}): remove it, and run marval cache again") from None
        return self._mapped[shard][index - self.starts[shard], side]


def shard_file(folder: Path, shard: int) -> Path:
    """Name a shard's file."""
    return folder / f"shard-{shard:05d}.safetensors"
