"""What several verbs' arguments stand for: a device, a model, the images that it is trained on."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from marval.data import TrainingData
    from marval.pipeline import Pipeline

TESTED = ("cpu", "cuda")  # kinds of devices that the tests have run on


def usable_device(name: str) -> str:
    """`name`, or for "auto" the accelerator of this machine (of a kind that was tested), else "cpu".

    Raises:
        ValueError: no such device here.
    """
    import torch

    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found.type if found is not None and found.type in TESTED else "cpu"
    try:
        kind = torch.device(name).type
        if kind == "meta":
            raise ValueError("it holds no numbers")
        torch.zeros(1, device=name).cpu()
    except Exception as error:  # torch raises many kinds, from its back ends too
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"--device {name}: not here ({reason}); expected auto, cpu or cuda") from None
    if kind not in TESTED:
        print(f"warning: marval was never tested on {kind}: compare some pictures with --device cpu", file=sys.stderr)
    return name


def load_pipeline(name: str, device: str) -> "Pipeline":
    """A bundled model by name, or a model's or run's folder."""
    from marval.pipeline import load

    return load(name, usable_device(device))


def data_of(pipeline: "Pipeline", data: str | None) -> "TrainingData":
    """The images that `--data` names, or those that the model was trained on; checked against the model."""
    from marval.data import check_data, load_data

    space = pipeline.config.space
    images = load_data(data or pipeline.config.data, size=space.image_size, channels=space.channels)
    check_data(images, pipeline.config)
    return images
