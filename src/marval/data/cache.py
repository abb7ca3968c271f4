"""Write a cache of a VAE's latents (see `LatentData`), alone or with several processes."""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors import safe_open
from torch import Tensor

from marval.data.captions import Captioned
from marval.data.folder import Labelled, check_damaged, list_images
from marval.data.images import in_threads
from marval.data.latents import INDEX, PLAN, LatentData, shard_file
from marval.io.files import check_output, write_tensors, write_text
from marval.io.images import centre_crop, read_image
from marval.io.vae import load_vae, vae_hash, vae_place
from marval.runtime.distributed import Workers
from marval.runtime.progress import progress

SHARD = 1024  # images
ADVICE = "; then remove {} or cache into another folder"  # after damaged images were mended


def cache_latents(
    images: Path,
    vae: str,
    out: Path,
    *,
    image_size: int = 256,
    batch_size: int = 32,
    scale: float | None = None,
    mirrors: bool = True,
    workers: Workers | None = None,
) -> LatentData | None:
    """Encode a folder of images (of classes, or with captions) into a cache; goes on where an earlier run stopped.

    Args:
        vae: the VAE's folder, a bundled one or a hub id, which the index names for the models trained on the cache.
        image_size: pixels a side, after `centre_crop`.
        scale: the latents' scale; fitted (1 / standard deviation) when None.
        mirrors: encode every image's mirror as well, which training then draws for half of the images.
        workers: the processes that share the shards.

    Returns:
        The cache; None when the run was asked to stop.
    """
    check_output(out, folder=True)
    workers = workers or Workers()
    class_names, files, captioned = list_images(images, captions=True)
    vae = vae_place(vae)
    encoder = load_vae(vae, workers.device, download=True)
    trial = _moments(encoder, torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8), False, workers.device)
    if not math.log2(image_size / trial.shape[-1]).is_integer():
        raise ValueError(f"--image-size {image_size}: expected a multiple of the VAE's stride")
    sha256 = vae_hash(vae)
    plan = {
        "listing": listing_hash(images, files), "vae_sha256": sha256 or vae,  # its name where the weights are no files
        "image_size": image_size, "shard_size": SHARD, **({} if mirrors else {"mirrors": False}),
    }  # fmt: skip
    if workers.main:
        _claim(out, plan)
    workers.barrier()
    shards = [files[start : start + SHARD] for start in range(0, len(files), SHARD)]
    missing = [i for i in range(workers.rank, len(shards), workers.count) if not shard_file(out, i).is_file()]
    label, damaged = f"images, the share of one of {workers.count} processes", list[str]()
    with progress(sum(len(shards[i]) for i in missing), label, quiet=not workers.main) as advance:
        for i in missing:
            if workers.stop.is_set():
                break
            tensors, metadata = _encode(
                encoder, shards[i], image_size, batch_size, mirrors, workers.device, advance
            )  # fmt: skip
            damaged += metadata["damaged"]
            write_tensors(shard_file(out, i), tensors, {"marval": json.dumps(metadata)})
            check_damaged(damaged, len(files), ADVICE.format(out))
    if workers.stopping():  # all of them stop where one was asked to; it waits for the slowest
        return None
    if workers.main:
        about = {"class_names": class_names, "scale": scale, "vae": vae, "vae_sha256": sha256}
        _write_index(out, {**plan, **about}, shards, captioned)
    workers.barrier()
    return LatentData.open(out)


def listing_hash(root: Path, files: Sequence[Labelled]) -> str:
    """Hash (SHA-256) the files' classes, names, sizes and times, which change when a picture does."""
    digest = hashlib.sha256()
    for file, label in files:
        status = os.stat(file)
        name = os.fsencode(os.path.relpath(file, root))
        digest.update(b"%d %d %d %s\0" % (label, status.st_size, status.st_mtime_ns, name))
    return digest.hexdigest()


def _claim(out: Path, plan: dict[str, Any]) -> None:
    """Write what will be cached; the first shard makes it final."""
    if any(out.glob("shard-*.safetensors")):
        before = json.loads((out / PLAN).read_text()) if (out / PLAN).is_file() else {}
        if changed := [key for key in {**before, **plan} if before.get(key) != plan.get(key)]:
            raise ValueError(
                f"{out} caches something else (another {', '.join(changed)}): choose another folder, or remove it"
            )
    write_text(out / PLAN, json.dumps(plan, indent=1) + "\n")


@torch.inference_mode()
def _moments(
    vae: Any, images: UInt8[Tensor, "b 3 h w"], mirrors: bool, device: torch.device
) -> Float[Tensor, "b s c2 h2 w2"]:
    """Encode images (and their mirrors): the posterior's mean and log-variance, stacked in the channels."""
    x = images.to(device).float() / 127.5 - 1
    sides = [x, x.flip(3)] if mirrors else [x]
    parameters = vae.encode(torch.cat(sides).to(vae.dtype)).latent_dist.parameters
    return parameters.float().cpu().unflatten(0, (len(sides), -1)).transpose(0, 1)


def _encode(
    vae: Any,
    files: Sequence[Labelled],
    size: int,
    batch_size: int,
    mirrors: bool,
    device: torch.device,
    advance: Callable[[int], None],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Encode a shard's files, while the next ones are decoded, to moments and labels; `kept` are these files' places.

    Beside them it says why damaged images cannot be read, and the number, expected sum and sum of squares of the
    samples of latents, on which the scale is fitted.
    """

    def read(file: Labelled) -> UInt8[Tensor, "3 h w"]:
        picture = centre_crop(read_image(Path(file[0])).convert("RGB"), size)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    moments, kept, damaged = [torch.zeros(0, 1 + mirrors, 2, 0, 0)], list[int](), list[str]()
    results = zip(in_threads(read, files), range(len(files)), strict=True)
    while batch := list(islice(results, batch_size)):
        damaged += [str(image) for image, _ in batch if isinstance(image, ValueError)]
        images = [(image, place) for image, place in batch if isinstance(image, Tensor)]
        if images:
            moments.append(_moments(vae, torch.stack([image for image, _ in images]), mirrors, device))
            kept += [place for _, place in images]
        advance(len(batch))
    encoded = torch.cat(moments[1:] or moments)
    if not encoded.half().isfinite().all():
        raise ValueError(f"the VAE encodes some of {files[0][0]} and the next to numbers that are not finite")
    mean, log_variance = (part.double() for part in encoded.chunk(2, dim=2))
    square = mean.square() + log_variance.clamp(-30, 20).exp()
    sums = {"sum": mean.sum().item(), "square": square.sum().item(), "numbers": mean.numel()}
    labels = torch.tensor([files[place][1] for place in kept]).long()
    tensors = {"moments": encoded.half(), "labels": labels, "kept": torch.tensor(kept).long()}
    return tensors, {**sums, "damaged": damaged}


def _write_index(
    out: Path, about: dict[str, Any], shards: Sequence[Sequence[Labelled]], captioned: Captioned | None
) -> None:
    """Gather what the shards say into the index, with the captions of their images, and print it."""
    counts, labels, damaged = list[int](), list[int](), list[str]()
    shape, sums, kept = [0, 0, 0], Counter[str](), list[str]()
    for i, files in enumerate(shards):
        with safe_open(shard_file(out, i), framework="pt") as content:
            metadata = json.loads(content.metadata()["marval"])
            count, *size = content.get_slice("moments").get_shape()
            labels += content.get_tensor("labels").tolist()
            if captioned is not None:
                kept += [files[place][0] for place in content.get_tensor("kept").tolist()]
        if count:
            shape = [size[1] // 2, *size[2:]]
        counts.append(count)
        damaged += metadata.pop("damaged")
        sums.update(metadata)
    check_damaged(damaged, len(damaged) + len(labels), ADVICE.format(out))
    fitted = 1 / math.sqrt(sums["square"] / sums["numbers"] - (sums["sum"] / sums["numbers"]) ** 2)
    scale = fitted if about["scale"] is None else about["scale"]
    index = {"counts": counts, "labels": labels, "shape": shape, "fitted_scale": fitted, "damaged": damaged}
    if captioned is not None:
        index["captions"] = captioned.captions(kept, "").to_dict()
    write_text(out / INDEX, json.dumps({**about, "scale": scale, **index}) + "\n")
    left_out = f", {len(damaged)} that cannot be read are listed in {out / INDEX}" if damaged else ""
    what = "images" if about.get("mirrors") is False else "images and their mirrors"
    print(f"{sum(counts)} {what} in {out}{left_out}; the latents' scale (1 / std) is {fitted:.4f}")
