"""Caches of a VAE's latents: the posterior's moments of every image and its mirror, in shards with an index.

A cache is a folder with `plan.json` (what is cached), `shard-00000.safetensors` and so on (each written whole, so
that a killed run goes on where it was), and `index.json`, written last. The plan knows the VAE by its weights and the
pictures by their names, sizes and times; the first shard claims the folder for it.
"""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from marval.data.folder import Labelled, check_corrupt, list_folder, listing_hash, say_left_out
from marval.data.reading import in_threads
from marval.io.files import write_tensors, write_text
from marval.io.images import read_image
from marval.io.vae import vae_hash, vae_place
from marval.runtime.distributed import Workers
from marval.runtime.rng import generator
from marval.spaces import Latents, TokenSpace

PLAN, INDEX = "plan.json", "index.json"
SAID = {"listing": "other pictures, or changed ones", "vae_sha256": "a VAE of other weights"}  # of the plan's hashes


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
    vae_sha256: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def open(cls, folder: Path) -> "LatentData":
        """A cache that `cache_latents` finished.

        Raises:
            ValueError: not a cache, an unfinished or a damaged one.
        """
        try:
            index = json.loads((folder / INDEX).read_text())
            starts = (0, *itertools.accumulate(index["counts"][:-1]))
            return cls(
                folder, torch.tensor(index["labels"]), tuple(index["class_names"]), tuple(index["shape"]),
                starts, index["scale"], index["image_size"], index["vae"], index.get("vae_sha256", ""),
            )  # fmt: skip
        except FileNotFoundError:
            unfinished = (folder / PLAN).is_file()
            raise ValueError(
                f"{folder} is {'an unfinished' if unfinished else 'no'} cache of latents: run marval cache-latents"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / INDEX} is damaged ({error}): remove it and run marval cache-latents") from None

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
        file = shard_file(self.folder, shard)
        try:
            with safe_open(file, framework="pt") as content:
                return content.get_slice("moments")[index - self.starts[shard]]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged ({error}): remove it, and run marval cache-latents again") from None


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


def read_square(file: Labelled, size: int) -> Tensor | ValueError:
    """An RGB image as bytes (3, size, size); the error when it cannot be read."""
    try:
        image = read_image(Path(file[0])).convert("RGB")
    except ValueError as error:
        return error
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
        vae: the VAE's folder or hub id, kept for the models trained on the cache.
        image_size: pixels a side, after `centre_crop`.
        scale: the latents' scale; fitted (1 / standard deviation) when None.
        workers: the processes that share the shards.
        load_vae: gives the VAE (diffusers' `AutoencoderKL`) on the device.

    Returns:
        The cache; None when the run was asked to stop.

    Raises:
        ValueError: no images, a bad setting or VAE, `out` caches something else, too many corrupt images, or a full
            disk.
    """
    if batch_size < 1 or not (scale is None or 0 < scale < math.inf):
        raise ValueError(f"batches of {batch_size}, scale {scale}: expected at least 1, and a scale above 0 or none")
    workers = workers or Workers()
    found = list_folder(images)
    network = load_vae()
    check_vae(network, image_size, workers.device)
    plan = {
        "images": len(found.files), "listing": listing_hash(images, found.files),
        "vae_sha256": vae_hash(vae) or vae,  # its name where the weights are no files
        "image_size": image_size, "shard_size": shard_size,
    }  # fmt: skip
    workers.barrier()
    if workers.main:
        claim(out, plan)
        say_left_out(found)
    workers.barrier()
    shards = [found.files[start : start + shard_size] for start in range(0, len(found.files), shard_size)]
    if not encode_shards(network, shards, out, image_size, batch_size, workers, report):
        return None
    if workers.main:
        index = {**plan, "vae": vae_place(vae), "vae_sha256": vae_hash(vae)}
        write_index(out, index, shards, found.class_names, scale, report)
    workers.barrier()
    return LatentData.open(out)


@torch.inference_mode()
def check_vae(vae: Any, image_size: int, device: torch.device) -> None:
    """Encode a grey image, before anything is written.

    Raises:
        ValueError: the VAE cannot encode images of this size, whole, to finite numbers.
    """
    if image_size < 8:
        raise ValueError(f"--image-size {image_size}: expected at least 8")
    try:
        grey = torch.zeros(1, 3, image_size, image_size, device=device)
        latents = vae.encode(grey.to(vae.dtype)).latent_dist.parameters.float()
    except RuntimeError as error:
        raise ValueError(
            f"the VAE cannot encode images of {image_size} pixels ({str(error).splitlines()[0]})"
        ) from None
    stride = image_size / latents.shape[-1]
    if not math.log2(stride).is_integer():
        near = 2 ** math.floor(math.log2(stride))
        raise ValueError(f"--image-size {image_size}: expected a multiple of the VAE's stride of {near} pixels")
    if not latents.isfinite().all():
        raise ValueError("the VAE encodes a grey image to numbers that are not finite: its weights are damaged")


def claim(out: Path, plan: dict[str, Any]) -> None:
    """Write what will be cached; the first shard makes it final.

    Raises:
        ValueError: the folder has shards of something else.
    """
    if any(out.glob("shard-*.safetensors")):
        try:
            found = json.loads((out / PLAN).read_text())
        except (OSError, ValueError):
            found = {}
        changed = [key for key, value in plan.items() if found.get(key) != value]
        if changed:
            said = [SAID.get(key, f"{key} was {found.get(key)}, now {plan[key]}") for key in changed]
            raise ValueError(f"{out} caches something else ({', '.join(said)}): choose another folder, or remove it")
    write_text(out / PLAN, json.dumps(plan, indent=1) + "\n")


def encode_shards(
    vae: Any,
    shards: Sequence[Sequence[Labelled]],
    out: Path,
    image_size: int,
    batch_size: int,
    workers: Workers,
    report: Callable[[str], None],
) -> bool:
    """Write this process's shards, but those that are there; False when the run was asked to stop.

    Raises:
        ValueError: too many corrupt images, latents that are not finite, or a full disk.
    """
    total = sum(len(shard) for shard in shards)
    own = [i for i in range(workers.rank, len(shards), workers.count) if not shard_file(out, i).is_file()]
    left = sum(len(shards[i]) for i in own)
    began, printed, done, corrupt = time.monotonic(), 0.0, 0, list[str]()
    for i in own:
        if workers.stop.is_set():
            break
        corrupt += encode_shard(vae, shards[i], shard_file(out, i), image_size, batch_size, workers.device)
        check_corrupt(corrupt, total, f"; then remove {out} or cache into another folder")
        done, left = done + len(shards[i]), left - len(shards[i])
        if workers.main and (time.monotonic() - printed > 5 or i == own[-1]):
            printed = time.monotonic()
            rate = done / (printed - began)
            of_all = f" of this process's share, one of {workers.count}" if workers.count > 1 else ""
            report(
                f"{done} of {done + left} images{of_all}  {rate * workers.count:.0f} images/s  "
                f"{int(left / rate // 60)} min {int(left / rate % 60)} s left"
            )
    return not workers.stopping()  # all of them stop where one was asked to; it waits for the slowest


@torch.inference_mode()
def encode_shard(
    vae: Any, files: Sequence[Labelled], target: Path, image_size: int, batch_size: int, device: torch.device
) -> list[str]:
    """Write one shard, whole or not at all; returns why its unreadable images cannot be read.

    Raises:
        ValueError: latents that are not finite in half precision, or a full disk.
    """
    moments, kept, corrupt = list[Tensor](), list[int](), list[str]()
    for batch in read_batches(files, image_size, batch_size):
        pictures = [(picture, label) for picture, label in batch if isinstance(picture, Tensor)]
        corrupt += [str(picture) for picture, _ in batch if isinstance(picture, ValueError)]
        if not pictures:
            continue
        kept += [label for _, label in pictures]
        x = torch.stack([picture for picture, _ in pictures]).to(device).float() / 127.5 - 1
        both = torch.cat([x, x.flip(3)])
        parameters = vae.encode(both.to(vae.dtype)).latent_dist.parameters.float().cpu()
        moments.append(parameters.unflatten(0, (2, -1)).transpose(0, 1))
    found = torch.cat(moments) if moments else torch.zeros(0)
    if not found.half().isfinite().all():
        raise ValueError(f"the VAE encodes some of {files[0][0]} and the next images to numbers that are not finite")
    mean, log_variance = found.chunk(2, dim=2) if moments else (found, found)
    # Sums of posterior samples' expected values and squares: what the scale is fitted on.
    total = float(mean.double().sum())
    square = float((mean.double().square() + log_variance.clamp(-30, 20).double().exp()).sum())
    about = {"sum": total, "square": square, "numbers": mean.numel(), "corrupt": corrupt}
    tensors = {"moments": found.half(), "labels": torch.tensor(kept, dtype=torch.long)}
    write_tensors(target, tensors, {"marval": json.dumps(about)})
    return corrupt


def read_batches(
    files: Sequence[Labelled], image_size: int, batch_size: int
) -> Iterator[list[tuple[Tensor | ValueError, int]]]:
    """Batches of pictures (or errors) with their classes; the next ones are decoded while one is being encoded."""
    pictures = in_threads(lambda file: read_square(file, image_size), files, ahead=2 * batch_size)
    labelled = ((picture, label) for picture, (_, label) in zip(pictures, files, strict=False))
    while batch := list(itertools.islice(labelled, batch_size)):
        yield batch


def write_index(
    out: Path,
    plan: dict[str, Any],
    shards: Sequence[Sequence[Labelled]],
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
    check_corrupt(corrupt, plan["images"], f"; then remove {out} or cache into another folder")
    fitted = 1 / math.sqrt(square / numbers - (total / numbers) ** 2)
    index = {
        **plan, "class_names": names, "counts": counts, "labels": labels, "shape": shape,
        "scale": fitted if scale is None else scale, "fitted_scale": fitted, "corrupt": corrupt,
    }  # fmt: skip
    write_text(out / INDEX, json.dumps(index) + "\n")
    skipped = f", {len(corrupt)} that cannot be read are listed in {out / INDEX}" if corrupt else ""
    report(f"{sum(counts)} images and their mirrors in {out}{skipped}; the latents' scale (1 / std) is {fitted:.4f}")
