"""Caches of a VAE's latents: the posterior's moments of every image and its mirror, in shards with an index.

A cache is a folder with `plan.json` (what is cached), `shard-00000.safetensors` and so on (each written whole, so
that a killed run goes on where it was), and `index.json`, written last.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from marval.data.images import class_names, list_folder, open_image
from marval.io.files import write_tensors, write_text
from marval.parallel import Workers
from marval.randomness import generator
from marval.spaces import Latents, TokenSpace

PLAN, INDEX = "plan.json", "index.json"
MOST_CORRUPT = 0.01  # a larger share of images that cannot be read stops the run


@dataclass(frozen=True)
class LatentData:
    """A finished cache, read from disk as it is asked for."""

    folder: Path
    labels: Int[Tensor, " n"]
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]  # channels, rows, columns of a latent
    starts: tuple[int, ...]  # each shard's first image
    scale: float  # 1 / standard deviation of the latents
    image_size: int
    vae: str

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def open(cls, folder: Path) -> "LatentData":
        """A cache that `cache_latents` finished.

        Raises:
            ValueError: not a cache, or an unfinished one.
        """
        try:
            index = json.loads((folder / INDEX).read_text())
        except FileNotFoundError:
            unfinished = (folder / PLAN).is_file()
            raise ValueError(
                f"{folder} is {'an unfinished' if unfinished else 'no'} cache of latents: run marval cache-latents"
            ) from None
        except ValueError as error:
            raise ValueError(f"{folder / INDEX} is damaged ({error}): remove it and run marval cache-latents") from None
        starts = [0]
        for count in index["counts"]:
            starts.append(starts[-1] + count)
        return cls(
            folder, torch.tensor(index["labels"]), tuple(index["class_names"]), tuple(index["shape"]),
            tuple(starts[:-1]), index["scale"], index["image_size"], index["vae"],
        )  # fmt: skip

    def tokens(
        self,
        indices: Int[Tensor, " batch"],
        rows: slice,
        space: TokenSpace,
        device: torch.device,
        stream: tuple[int | str, ...] = (),
    ) -> tuple[Float[Tensor, "b l c"], Int[Tensor, " b"]]:
        """Tokens of posterior samples, each of the image or of its mirror, and labels: some rows of a batch.

        Args:
            stream: names the random draws; those of the batch's row j are `generator(*stream, j)`'s.
        """
        if not isinstance(space, Latents):
            raise ValueError("a cache of latents needs a model that draws latents")
        latents = []
        for j, index in list(enumerate(indices.tolist()))[rows]:
            rng = generator(*stream, j)
            mirrored = int(torch.rand((), generator=rng) < 0.5)
            mean, log_variance = self.moments(index)[mirrored].float().chunk(2)
            noise = torch.randn(self.shape, generator=rng)
            latents.append(mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise)
        return space.tokens(torch.stack(latents).to(device)), self.labels[indices[rows]].to(device)

    def moments(self, index: int) -> Float[Tensor, "2 c2 h w"]:
        """Mean and log-variance (stacked in the channels) of an image and of its mirror."""
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        with safe_open(shard_file(self.folder, shard), framework="pt") as content:
            return content.get_slice("moments")[index - self.starts[shard]]


def shard_file(folder: Path, shard: int) -> Path:
    """Where a shard lies."""
    return folder / f"shard-{shard:05d}.safetensors"


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's square crop: halve (box filter) while twice too large, scale the short side to `size` (bicubic), cut."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_square(file: Path, size: int) -> Tensor | None:
    """An RGB image as bytes (3, size, size); None when it cannot be read."""
    try:
        image = open_image(file).convert("RGB")
    except ValueError:
        return None
    return torch.from_numpy(np.array(centre_crop(image, size))).permute(2, 0, 1)


def cache_latents(
    images: Path,
    vae: str,
    out: Path,
    *,
    image_size: int = 256,
    batch_size: int = 32,
    shard_size: int = 1024,
    scale: float | None = None,
    workers: Workers | None = None,
    load_vae: Callable[[], Any],
    report: Callable[[str], None] = print,
) -> LatentData | None:
    """Encode a folder of images (one sub-folder per class) into a cache; goes on where an earlier run stopped.

    Args:
        vae: the VAE's name, kept for the models trained on the cache.
        image_size: pixels a side, after `centre_crop`.
        scale: the latents' scale; fitted (1 / standard deviation) when None.
        workers: the processes that share the shards.
        load_vae: gives the VAE (diffusers' `AutoencoderKL`) on the device.

    Returns:
        The cache; None when the run was asked to stop.

    Raises:
        ValueError: no images, `out` caches something else, too many corrupt images, or a full disk.
    """
    workers = workers or Workers()
    folders, files = list_folder(images)
    listing = "".join(f"{label} {file.relative_to(images)}\n" for file, label in files)
    plan = {
        "images": len(files), "listing": hashlib.sha256(listing.encode()).hexdigest(), "vae": vae,
        "image_size": image_size, "shard_size": shard_size,
    }  # fmt: skip
    if (out / PLAN).is_file() and (found := json.loads((out / PLAN).read_text())) != plan:
        changed = ", ".join(f"{k} was {found.get(k)}, now {plan[k]}" for k in plan if found.get(k) != plan[k])
        raise ValueError(f"{out} caches something else ({changed}): choose another folder")
    workers.barrier()
    if workers.main:
        write_text(out / PLAN, json.dumps(plan, indent=1) + "\n")
    shards = [files[start : start + shard_size] for start in range(0, len(files), shard_size)]
    own = [i for i in range(workers.rank, len(shards), workers.count) if not shard_file(out, i).is_file()]
    network = load_vae() if own else None
    began, done, corrupt, printed = time.monotonic(), 0, 0, 0.0
    for i in own:
        if workers.stop.is_set():
            break
        corrupt += encode_shard(network, shards[i], shard_file(out, i), image_size, batch_size, workers.device)
        done += len(shards[i])
        if corrupt > MOST_CORRUPT * len(files):
            raise ValueError(
                f"{corrupt} of the first {done} images cannot be read, more than {MOST_CORRUPT:.0%} of all: "
                f"look at the corrupt files named in {shard_file(out, i)}, mend or remove them"
            )
        if workers.main and (time.monotonic() - printed > 5 or i == own[-1]):
            printed = time.monotonic()
            rate = done / (printed - began)
            left = (sum(len(shards[j]) for j in own) - done) / rate
            report(
                f"{done * workers.count} of {len(own) * shard_size * workers.count} images  "
                f"{rate * workers.count:.0f} images/s  {int(left // 60)} min {int(left % 60)} s left"
            )
    if workers.stopping():  # all of them stop where one was asked to; it waits for the slowest
        return None
    if workers.main:
        write_index(out, plan, shards, class_names(folders), scale, report)
    workers.barrier()
    return LatentData.open(out)


@torch.inference_mode()
def encode_shard(
    vae: Any, files: Sequence[tuple[Path, int]], target: Path, image_size: int, batch_size: int, device: torch.device
) -> int:
    """Write one shard, whole or not at all; returns how many of its images could not be read."""
    moments, kept, corrupt = [], [], []
    for batch, pictures in read_ahead(files, image_size, batch_size):
        readable = [picture for picture in pictures if picture is not None]
        kept += [label for (_, label), picture in zip(batch, pictures, strict=True) if picture is not None]
        corrupt += [str(file) for (file, _), picture in zip(batch, pictures, strict=True) if picture is None]
        if not readable:
            continue
        x = torch.stack(readable).to(device).float() / 127.5 - 1
        both = torch.cat([x, x.flip(3)])
        parameters = vae.encode(both.to(vae.dtype)).latent_dist.parameters.float().cpu()
        moments.append(parameters.unflatten(0, (2, -1)).transpose(0, 1))
    found = torch.cat(moments) if moments else torch.zeros(0)
    mean, log_variance = found.chunk(2, dim=2) if moments else (found, found)
    # Sums of posterior samples' expected values and squares: what the scale is fitted on.
    total = float(mean.double().sum())
    square = float((mean.double().square() + log_variance.clamp(-30, 20).double().exp()).sum())
    about = {"sum": total, "square": square, "numbers": mean.numel(), "corrupt": corrupt}
    tensors = {"moments": found.half(), "labels": torch.tensor(kept, dtype=torch.long)}
    write_tensors(target, tensors, {"marval": json.dumps(about)})
    return len(corrupt)


def read_ahead(
    files: Sequence[tuple[Path, int]], image_size: int, batch_size: int
) -> Iterator[tuple[Sequence[tuple[Path, int]], list[Tensor | None]]]:
    """Batches of files and their pictures; the next batch is decoded while one is being encoded."""
    batches = [files[start : start + batch_size] for start in range(0, len(files), batch_size)]
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(read_square, file, image_size) for file, _ in batches[0]]
        for i, batch in enumerate(batches):
            pictures = [picture.result() for picture in waiting]
            if i + 1 < len(batches):
                waiting = [pool.submit(read_square, file, image_size) for file, _ in batches[i + 1]]
            yield batch, pictures


def write_index(
    out: Path,
    plan: dict[str, Any],
    shards: Sequence[Sequence[tuple[Path, int]]],
    names: tuple[str, ...],
    scale: float | None,
    report: Callable[[str], None],
) -> None:
    """Gather what the shards say into the index.

    Raises:
        ValueError: a damaged shard, or too many corrupt images.
    """
    counts, labels, corrupt, shape = [], [], [], [0, 0, 0]
    numbers, total, square = 0, 0.0, 0.0
    for i in range(len(shards)):
        file = shard_file(out, i)
        try:
            with safe_open(file, framework="pt") as content:
                about = json.loads(content.metadata()["marval"])
                size = content.get_slice("moments").get_shape()
                labels += content.get_tensor("labels").tolist()
        except (SafetensorError, OSError, KeyError) as error:
            raise ValueError(f"{file} is damaged ({error}): remove it and run the same command") from None
        counts.append(size[0])
        if len(size) == 5:
            shape = [size[2] // 2, size[3], size[4]]
        corrupt += about["corrupt"]
        numbers, total, square = numbers + about["numbers"], total + about["sum"], square + about["square"]
    if len(corrupt) > MOST_CORRUPT * plan["images"]:
        raise ValueError(
            f"{len(corrupt)} of {plan['images']} images cannot be read, more than {MOST_CORRUPT:.0%}, such as "
            f"{corrupt[0]}: mend or remove them, and cache into another folder"
        )
    fitted = 1 / math.sqrt(square / numbers - (total / numbers) ** 2)
    index = {
        **plan, "class_names": names, "counts": counts, "labels": labels, "shape": shape,
        "scale": fitted if scale is None else scale, "fitted_scale": fitted, "corrupt": corrupt,
    }  # fmt: skip
    write_text(out / INDEX, json.dumps(index) + "\n")
    skipped = f", {len(corrupt)} that cannot be read are listed in {out / INDEX}" if corrupt else ""
    report(f"{sum(counts)} images and their mirrors in {out}{skipped}; the latents' scale (1 / std) is {fitted:.4f}")
