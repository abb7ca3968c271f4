"""Data sets by their specification, and whether they fit a model."""

from pathlib import Path

from marval.config import ModelConfig, PixelSpace
from marval.data.images import ImageData, load_fashion_mnist, load_folder
from marval.data.latents import LatentData

TrainingData = ImageData | LatentData


def load_images(
    spec: str, split: str = "train", size: tuple[int, int] | None = None, limit: int | None = None
) -> ImageData:
    """Images by their specification: "fashion-mnist", "fashion-mnist:FOLDER" or "folder:DIR".

    Args:
        size: rows and columns that folder images are brought to; inferred when None.
        limit: read so many images of a folder only, from all classes alike.

    Raises:
        ValueError: an unknown specification, or data that cannot be read.
    """
    kind, _, where = spec.partition(":")
    if kind == "fashion-mnist":
        return load_fashion_mnist(split, where or None)
    if kind == "folder" and where:
        return load_folder(where, size, limit=limit)
    raise ValueError(f"unknown data {spec!r}: expected fashion-mnist, fashion-mnist:FOLDER, folder:DIR or latents:DIR")


def load_data(spec: str, size: tuple[int, int] | None = None) -> TrainingData:
    """What a generator is trained on: images as `load_images`, or "latents:DIR", a cache of a VAE's latents.

    Raises:
        ValueError: as `load_images`, or an unfinished cache.
    """
    kind, _, where = spec.partition(":")
    return LatentData.open(Path(where)) if kind == "latents" and where else load_images(spec, size=size)


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
        ValueError: other classes, size or channels than the model's.
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
