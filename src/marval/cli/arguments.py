"""What several verbs' arguments stand for: models, a device, the images that a model is trained on."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from marval.data import TrainingData
    from marval.pipeline import Pipeline

BUNDLED = (  # of each kind in the order of their making
    "emoji-teacher", "emoji-student", "emoji-tuned", "fashion-teacher", "fashion-student", "fashion-tuned",
)  # fmt: skip


def usable_device(name: str) -> str:
    """`name`, which is a device of this machine; for "auto" "cuda" where that is here, else "cpu"."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
        torch.zeros(1, device=name).cpu()
    except Exception as error:  # torch raises many kinds, from its back ends too
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"--device {name}: not here ({reason}); expected auto, cpu or cuda") from None
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: marval was never tested on it; expected auto, cpu or cuda")
    return name


def data_of(pipeline: "Pipeline", data: str | None) -> "TrainingData":
    """The images that `--data` names, or those that the model was trained on; checked against the model."""
    from marval.data import check_data, load_data

    space = pipeline.config.space
    encoder = pipeline.config.encoder
    images = load_data(data or pipeline.config.data, size=space.image_size, channels=space.channels, encoder=encoder)
    check_data(images, pipeline.config)
    if images.captions is not None:
        _ = images.captions.sentences  # encoded once; an encoder that is missing is refused here
    return images
