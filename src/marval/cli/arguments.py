"""What the verbs' arguments stand for: the device, models, data and judges that they name; and the whole command."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from marval.data import ImageData, TrainingData
    from marval.evaluate.evaluate import Judge
    from marval.pipeline import Pipeline


def usable_device(name: str) -> str:
    """`name`, or the best device here for "auto".

    Raises:
        ValueError: no such device here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: not here ({str(error).splitlines()[0]})") from None
    return name


def load_pipeline(name: str, device: str) -> "Pipeline":
    """A bundled model by name, or a model's or run's folder."""
    from marval.pipeline import load

    return load(name, usable_device(device))


def data_of(pipeline: "Pipeline", data: str | None) -> "TrainingData":
    """The images that `--data` names, or those that the model was trained on; checked against the model."""
    from marval.data import check_data, load_data

    images = load_data(data or pipeline.config.data, size=pipeline.config.space.image_size)
    check_data(images, pipeline.config)
    return images


def judge_for(pipeline: "Pipeline", data: str | None, classifier: Path | None) -> "Judge":
    """What the model's images are judged by: `--judge` or the bundled classifier, and the real images' features.

    Raises:
        ValueError: the data are latents, which have no pictures to compare with, or do not fit the model.
    """
    from marval.data import check_classes, check_data, load_images
    from marval.evaluate.evaluate import load_judge

    spec = data or pipeline.config.data
    if spec.startswith("latents:"):
        raise ValueError(f"{spec} holds no pictures to compare with: name them with --data folder:DIR, or do not ask")

    def real_images() -> "ImageData":
        images = load_images(spec, size=pipeline.config.space.image_size)
        # A model of latents is trained on a cache, but its pictures are compared with pictures.
        (check_data if pipeline.config.space.kind == "pixels" else check_classes)(images, pipeline.config)
        return images

    return load_judge(spec, classifier, real_images)


def command_line() -> str:
    """What was typed, for provenance."""
    return " ".join(["marval", *sys.argv[1:]])
