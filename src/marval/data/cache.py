"""Write a cache of a VAE's latents (see `LatentData`), alone or with several processes."""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open
from torch import Tensor

from marval.data.folder import Labelled, check_damaged, list_folder, listing_hash
from marval.data.images import in_threads
from marval.data.latents import INDEX, PLAN, LatentData, shard_file
from marval.io.files import write_tensors, write_text
from marval.io.images import centre_crop, read_image
from marval.io.vae import load_vae, vae_hash, vae_place
from marval.runtime.distributed import Workers
from marval.runtime.progress import progress

SHARD = 1024  # images
CHANGES = {"listing": "other pictures, or changed ones", "vae_sha256": "a VAE of other weights"}  # of a plan's hashes
ADVICE = "; then remove {} or cache into another folder"  # after damaged images were mended


def cache_latents(
    images: Path,
    vae: str,
    out: Path,
    *,
    image_size: int = 256,
    batch_size: int = 32,
    scale: float | None = None,
    workers: Workers | None = None,
) -> LatentData | None:
    """Encode a folder of images (one sub-folder per class) into a cache; goes on where an earlier run stopped.

    Args:
        vae: the VAE's folder or hub id, which the index names for the models trained on the cache.
        image_size: pixels a side, after `centre_crop`.
        scale: the latents' scale; fitted (1 / standard deviation) when None.
        workers: the processes that share the shards.

    Returns:
        The cache; None when the run was asked to stop.
    """
    if batch_size < 1 or not (scale is None or 0 < scale < math.inf):
        raise ValueError(f"--batch-size {batch_size} --scale {scale}: expected at least 1, and a finite scale above 0")
    workers = workers or Workers()
    listing = list_folder(images)
    encoder = _Encoder(load_vae(vae, workers.device, download=True), image_size, batch_size, workers.device)
    sha256 = vae_hash(vae)
    plan = {
        "images": len(listing.files), "listing": listing_hash(images, listing.files),
        "vae_sha256": sha256 or vae,  # its name where the weights are no files
        "image_size": image_size, "shard_size": SHARD,
    }  # fmt: skip
    if workers.main:
        _claim(out, plan)
    workers.barrier()
    shards = [listing.files[start : start + SHARD] for start in range(0, len(listing.files), SHARD)]
    _write_shards(encoder, shards, out, workers)
    if workers.stopping():  # all of them stop where one was asked to; it waits for the slowest
        return None
    if workers.main:
        about = {"class_names": listing.class_names, "scale": scale, "vae": vae_place(vae), "vae_sha256": sha256}
        _write_index(out, {**plan, **about}, len(shards))
    workers.barrier()
    return LatentData.open(out)


def _claim(out: Path, plan: dict[str, Any]) -> None:
    """Write what will be cached; the first shard makes it final."""
    if any(out.glob("shard-*.safetensors")):
        try:
            before = json.loads((out / PLAN).read_text())
        except (OSError, ValueError):
            before = {}
        changed = [key for key, value in plan.items() if before.get(key) != value]
        if changed:
            changes = [CHANGES.get(key, f"{key} was {before.get(key)}, now {plan[key]}") for key in changed]
            raise ValueError(f"{out} caches something else ({', '.join(changes)}): choose another folder, or remove it")
    write_text(out / PLAN, json.dumps(plan, indent=1) + "\n")


def _write_shards(encoder: "_Encoder", shards: Sequence[Sequence[Labelled]], out: Path, workers: Workers) -> None:
    """Write this process's shards, except those that are there, until the run is asked to stop."""
    missing = [i for i in range(workers.rank, len(shards), workers.count) if not shard_file(out, i).is_file()]
    total, damaged = sum(map(len, shards)), list[str]()
    label = "images" if workers.count == 1 else f"images, the share of one of {workers.count} processes"
    with progress(sum(len(shards[i]) for i in missing), label, quiet=not workers.main) as advance:
        for i in missing:
            if workers.stop.is_set():
                return
            tensors, metadata = encoder.shard(shards[i], advance)
            damaged += metadata["corrupt"]
            write_tensors(shard_file(out, i), tensors, {"marval": json.dumps(metadata)})
            check_damaged(damaged, total, ADVICE.format(out))


@dataclass(frozen=True)
class _Encoder:
    """A VAE (diffusers' `AutoencoderKL`) that encodes files of images."""

    vae: Any
    image_size: int
    batch_size: int
    device: torch.device

    @torch.inference_mode()
    def moments(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 2 c2 h2 w2"]:
        """Encode images and their mirrors: the posterior's mean and log-variance, stacked in the channels."""
        x = images.to(self.device).float() / 127.5 - 1
        both = torch.cat([x, x.flip(3)]).to(self.vae.dtype)
        return self.vae.encode(both).latent_dist.parameters.float().cpu().unflatten(0, (2, -1)).transpose(0, 1)

    def __post_init__(self) -> None:
        """Refuse a VAE that cannot encode images of this size, whole, to finite numbers; nothing is written yet."""
        size = self.image_size
        if size < 8:
            raise ValueError(f"--image-size {size}: expected at least 8")
        try:
            moments = self.moments(torch.full((1, 3, size, size), 127, dtype=torch.uint8))
        except RuntimeError as error:
            raise ValueError(f"the VAE cannot encode images of {size} pixels ({str(error).splitlines()[0]})") from None
        stride = size / moments.shape[-1]
        if not math.log2(stride).is_integer():
            stride = 2 ** math.floor(math.log2(stride))
            raise ValueError(f"--image-size {size}: expected a multiple of the VAE's stride of {stride} pixels")
        if not moments.isfinite().all():
            raise ValueError("the VAE encodes a grey image to numbers that are not finite: its weights are damaged")

    def read(self, file: Labelled) -> UInt8[Tensor, "3 h w"]:
        """Read an image file as RGB bytes, cropped at the centre."""
        picture = centre_crop(read_image(Path(file[0])).convert("RGB"), self.image_size)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    def shard(
        self, files: Sequence[Labelled], advance: Callable[[int], None]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Encode a shard's files, while the next ones are decoded, to moments and labels.

        Beside them it says why damaged ("corrupt") images cannot be read, and the number, expected sum and sum of
        squares of the latents' samples, on which the scale is fitted.
        """
        moments, labels, damaged = list[Tensor](), list[int](), list[str]()
        results = zip(in_threads(self.read, files, ahead=2 * self.batch_size), files, strict=True)
        while batch := list(islice(results, self.batch_size)):
            damaged += [str(image) for image, _ in batch if isinstance(image, ValueError)]
            images = [(image, label) for image, (_, label) in batch if isinstance(image, Tensor)]
            if images:
                moments.append(self.moments(torch.stack([image for image, _ in images])))
                labels += [label for _, label in images]
            advance(len(batch))
        encoded = torch.cat(moments) if moments else torch.zeros(0, 2, 2, 0, 0)
        if not encoded.half().isfinite().all():
            raise ValueError(f"the VAE encodes some of {files[0][0]} and the next to numbers that are not finite")
        mean, log_variance = (part.double() for part in encoded.chunk(2, dim=2))
        square = mean.square() + log_variance.clamp(-30, 20).exp()
        sums = {"sum": mean.sum().item(), "square": square.sum().item(), "numbers": mean.numel()}
        return {"moments": encoded.half(), "labels": torch.tensor(labels).long()}, {**sums, "corrupt": damaged}


def _write_index(out: Path, about: dict[str, Any], shards: int) -> None:
    """Gather what the shards say into the index, and print it."""
    counts, labels, damaged = list[int](), list[int](), list[str]()
    shape, sums = [0, 0, 0], Counter[str]()
    for file in (shard_file(out, i) for i in range(shards)):
        try:
            with safe_open(file, framework="pt") as content:
                metadata = json.loads(content.metadata()["marval"])
                count, *size = content.get_slice("moments").get_shape()
                labels += content.get_tensor("labels").tolist()
        except (SafetensorError, OSError, KeyError) as error:
            raise ValueError(f"{file} is damaged ({error}): remove it and run the same command") from None
        if count:
            shape = [size[1] // 2, *size[2:]]
        counts.append(count)
        damaged += metadata.pop("corrupt")
        sums.update(metadata)
    check_damaged(damaged, about["images"], ADVICE.format(out))
    fitted = 1 / math.sqrt(sums["square"] / sums["numbers"] - (sums["sum"] / sums["numbers"]) ** 2)
    scale = fitted if about["scale"] is None else about["scale"]
    index = {"counts": counts, "labels": labels, "shape": shape, "fitted_scale": fitted, "corrupt": damaged}
    write_text(out / INDEX, json.dumps({**about, "scale": scale, **index}) + "\n")
    left_out = f", {len(damaged)} that cannot be read are listed in {out / INDEX}" if damaged else ""
    print(f"{sum(counts)} images and their mirrors in {out}{left_out}; the latents' scale (1 / std) is {fitted:.4f}")
