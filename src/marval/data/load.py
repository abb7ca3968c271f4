"""Data sets by name, and whether they fit a model."""

import math
from pathlib import Path

from marval.config import LatentSpace, ModelConfig, PixelSpace
from marval.data.captions import TRAIN
from marval.data.fashion import load_fashion_mnist
from marval.data.folder import load_folder
from marval.data.images import ImageData
from marval.data.latents import LatentData

TrainingData = ImageData | LatentData


def load_data(
    spec: str, size: tuple[int, int] | None = None, *, channels: int | None = None, encoder: str = ""
) -> TrainingData:
    """Load what a generator is trained on: images as `load_images`, or "latents:DIR", a cache of a VAE's latents."""
    kind, _, where = spec.partition(":")
    if kind == "latents" and where:
        return LatentData.open(Path(where), encoder)
    return load_images(spec, size=size, channels=channels, encoder=encoder)


def load_images(
    spec: str,
    split: str = "train",
    size: tuple[int, int] | None = None,
    *,
    channels: int | None = None,
    limit: int | None = None,
    encoder: str = "",
) -> ImageData:
    """Load "fashion-mnist", "fashion-mnist:FOLDER", "folder:DIR", or of captioned images "folder:DIR@SPLIT".

    Args:
        split: of Fashion-MNIST, "train" or "test".
        size: rows and columns that a folder's images are brought to; inferred when None.
        channels: 1 or 3, for a folder's images; inferred when None.
        limit: how many of a folder's images are read at most, from all classes alike.
        encoder: the sentence encoder of a folder's captions, if it has any; "": read classes.

    Raises:
        ValueError: an unknown name, or data that cannot be read.
    """
    kind, _, where = spec.partition(":")
    if kind == "fashion-mnist":
        return load_fashion_mnist(split, where or None)
    if kind == "folder" and where:
        folder, _, part = (where, "", TRAIN) if Path(where).exists() else where.rpartition("@")
        return load_folder(
            folder or where, size, limit=limit, channels=channels, encoder=encoder, split=part if folder else TRAIN
        )
    raise ValueError(f"unknown data {spec!r}: expected fashion-mnist, fashion-mnist:FOLDER, folder:DIR or latents:DIR")


def check_classes(data: TrainingData, config: ModelConfig) -> None:
    """Raise a ValueError unless the data have the model's classes or, of a model of text, its styles and encoder."""
    captions = data.captions
    if config.encoder and (captions is None or (captions.styles, captions.encoder) != (config.styles, config.encoder)):
        raise ValueError(
            f"the model draws prompts of the styles {', '.join(config.styles) or 'none'}, encoded by {config.encoder}: "
            "expected images with such captions (docs/text.md)"
        )
    if not config.encoder and data.class_names != config.class_names:
        raise ValueError(
            f"the data's classes ({', '.join(data.class_names[:4])}, ...) are not the model's "
            f"({', '.join(config.class_names[:4])}, ...): name the model's own data with --data"
        )


def check_data(data: TrainingData, config: ModelConfig) -> None:
    """Check that a model can be trained further on `data`.

    Raises:
        ValueError: other classes, size or channels than the model's, or latents of another VAE or scale.
    """
    check_classes(data, config)
    space = config.space
    if isinstance(data, LatentData) == isinstance(space, PixelSpace):
        expected = "images" if isinstance(space, PixelSpace) else "latents:DIR, made by marval cache"
        raise ValueError(f"the model draws {space.kind}: expected {expected}")
    stride, channels = (
        (1, space.channels) if isinstance(space, PixelSpace) else (space.vae_stride, space.latent_channels)
    )
    if data.shape != (shape := (channels, *(side // stride for side in space.image_size))):
        raise ValueError(f"the data's {space.kind} are {data.shape}, the model's are {shape}")
    if isinstance(space, LatentSpace) and isinstance(data, LatentData):
        hashes = data.vae_sha256, space.vae_sha256  # "": not known
        if hashes[0] != hashes[1] if all(hashes) else Path(data.vae).name != Path(space.vae).name:
            raise ValueError(
                f"the cache {data.folder} was made with the VAE {data.vae}, the model's is {space.vae}, of other "
                "weights: make a cache with the model's (marval cache)"
            )
        if not math.isclose(data.scale, space.scale, rel_tol=1e-3):
            raise ValueError(
                f"the cache {data.folder} has the scale {data.scale:.6g}, the model's is {space.scale:.6g}: run marval "
                f"cache on it again with --scale {space.scale:.6g} (nothing is encoded again)"
            )
