"""Data sets by their specification, and whether they fit a model."""

import math
from pathlib import Path

from marval.config import LatentSpace, ModelConfig, PixelSpace
from marval.data.fashion import load_fashion_mnist
from marval.data.folder import load_folder
from marval.data.images import ImageData
from marval.data.latents import LatentData
from marval.io.vae import same_vae

TrainingData = ImageData | LatentData


def load_images(
    spec: str,
    split: str = "train",
    size: tuple[int, int] | None = None,
    *,
    channels: int | None = None,
    limit: int | None = None,
) -> ImageData:
    """Images by their specification: "fashion-mnist", "fashion-mnist:FOLDER" or "folder:DIR".

    Args:
        size: rows and columns that a folder's images are brought to; inferred when None.
        channels: 3: a folder's images are RGB even where all are grey.
        limit: read at most this many of a folder's images (see `load_folder`).

    Raises:
        ValueError: an unknown specification, or data that cannot be read.
    """
    kind, _, where = spec.partition(":")
    if kind == "fashion-mnist":
        return load_fashion_mnist(split, where or None)
    if kind == "folder" and where:
        return load_folder(where, size, limit, channels=channels)
    raise ValueError(f"unknown data {spec!r}: expected fashion-mnist, fashion-mnist:FOLDER, folder:DIR or latents:DIR")


def load_data(spec: str, size: tuple[int, int] | None = None, *, channels: int | None = None) -> TrainingData:
    """What a generator is trained on: images as `load_images`, or "latents:DIR", a cache of a VAE's latents.

    Raises:
        ValueError: as `load_images`, or an unfinished cache.
    """
    kind, _, where = spec.partition(":")
    if kind == "latents" and where:
        return LatentData.open(Path(where))
    return load_images(spec, size=size, channels=channels)


def check_classes(data: TrainingData, config: ModelConfig) -> None:
    """Whether the data have the model's classes.

    Raises:
        ValueError: they have others.
    """
    if data.class_names != config.class_names:
        raise ValueError(
            f"the data's classes ({', '.join(data.class_names[:4])}, ...) are not the model's "
            f"({', '.join(config.class_names[:4])}, ...): name the model's own data with --data"
        )


def check_data(data: TrainingData, config: ModelConfig) -> None:
    """Whether a model can be trained further on `data`.

    Raises:
        ValueError: other classes, size or channels than the model's, or latents of another VAE or scale.
    """
    check_classes(data, config)
    if isinstance(data, LatentData) == isinstance(config.space, PixelSpace):
        raise ValueError(
            f"the model draws {config.space.kind}: expected "
            + ("images" if isinstance(config.space, PixelSpace) else "latents:DIR, made by marval cache-latents")
        )
    space = config.space
    if isinstance(space, PixelSpace):
        expected = (space.channels, *space.image_size)
    else:
        rows, columns = space.image_size
        expected = (space.latent_channels, rows // space.vae_stride, columns // space.vae_stride)
    if data.shape != expected:
        raise ValueError(f"the data's {space.kind} are {data.shape}, the model's are {expected}")
    if isinstance(space, LatentSpace) and isinstance(data, LatentData):
        if not same_vae((data.vae, data.vae_sha256), (space.vae, space.vae_sha256)):
            raise ValueError(
                f"the cache {data.folder} was made with the VAE {data.vae}, the model's is {space.vae}, of other "
                "weights: make a cache with the model's (marval cache-latents)"
            )
        if not math.isclose(data.scale, space.scale, rel_tol=1e-3):
            raise ValueError(
                f"the cache {data.folder} has the scale {data.scale:.6g}, the model's is {space.scale:.6g}: run marval "
                f"cache-latents on it again with --scale {space.scale:.6g} (nothing is encoded again)"
            )
