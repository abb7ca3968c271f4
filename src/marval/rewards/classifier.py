"""Small image classifiers: `plain` serves as a reward, `residual` as the held-out judge that no reward sees."""

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from marval.io.checkpoint import check_tensors
from marval.io.files import write_tensors
from marval.rewards.prompts import Prompt

Architecture = Literal["plain", "residual"]


def plain_network(channels: int, classes: int) -> nn.Module:
    """Strided convolutions with batch norm and ReLU, then a hidden layer."""

    def stage(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *stage(channels, 16, 1), *stage(16, 32, 2), *stage(32, 32, 1), *stage(32, 64, 2), *stage(64, 64, 1),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64 * 16, 128), nn.ReLU(), nn.Linear(128, classes),
    )  # fmt: skip


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and SiLU, before each, around a skip connection."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, stride, 1),
            nn.BatchNorm2d(outputs), nn.SiLU(), nn.Conv2d(outputs, outputs, 3, 1, 1),
        )  # fmt: skip
        self.skip = nn.Conv2d(inputs, outputs, 1, stride) if (inputs, stride) != (outputs, 1) else nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        return self.skip(x) + self.body(x)


def residual_network(channels: int, classes: int) -> nn.Module:
    """Pre-activation residual blocks and global average pooling."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, 1, 1),
        ResidualBlock(16, 32, 2), ResidualBlock(32, 64, 2), ResidualBlock(64, 64, 1),
        nn.BatchNorm2d(64), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, classes),
    )  # fmt: skip


class Classifier(nn.Module):
    """A classifier of images in [0, 1], with its class names."""

    def __init__(self, architecture: Architecture, channels: int, class_names: tuple[str, ...]):
        super().__init__()
        self.architecture, self.channels, self.class_names = architecture, channels, class_names
        build = {"plain": plain_network, "residual": residual_network}[architecture]
        self.network = build(channels, len(class_names))

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        """Logits."""
        return self.network(images * 2 - 1)

    def log_probability(self, images: Float[Tensor, "b c h w"], labels: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Log-probability of each image's class, in nats."""
        return self(images).log_softmax(dim=1).gather(1, labels[:, None])[:, 0]


class ClassifierReward:
    """Log-probability of the class that the prompt was made for; nothing is read from its text."""

    def __init__(self, classifier: Classifier):
        self.classifier = classifier.eval().requires_grad_(False)

    def __call__(self, images: Float[Tensor, "b c h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        labels = torch.tensor([self.class_of(prompt) for prompt in prompts], device=images.device)
        return self.classifier.log_probability(images, labels)

    def class_of(self, prompt: str) -> int:
        """The number that the classifier gives the prompt's class.

        Raises:
            ValueError: a prompt that was made for no class, or for one that the classifier does not know.
        """
        name = prompt.class_name if isinstance(prompt, Prompt) else ""
        if not name:
            raise ValueError(
                f"prompt {str(prompt)!r} was made for no class: the classifier's reward takes the prompts of classes, "
                "as marval.rewards.Prompt.of('a picture of {}', 'bag') makes them"
            )
        names = self.classifier.class_names
        if name not in names:
            raise ValueError(
                f"the classifier does not know {name!r}: it tells {', '.join(names[:10])} apart; make one "
                "for this model's classes with marval train-classifier, then --classifier FILE"
            )
        return names.index(name)


def save_classifier(file: Path, classifier: Classifier, figures: dict[str, object]) -> None:
    """Write a classifier and what is known of it (`figures`) to one safetensors file."""
    about = {
        "architecture": classifier.architecture, "channels": classifier.channels,
        "class_names": classifier.class_names, "figures": figures,
    }  # fmt: skip
    tensors = {name: t.detach().cpu() for name, t in classifier.state_dict().items()}
    write_tensors(file, tensors, {"format": "pt", "classifier": json.dumps(about)})


def classifier_file(file: Path | str) -> Path:
    """Where a classifier lies: a bundled one by name ("fashion-classifier", "fashion-judge"), or a file.

    Raises:
        ValueError: no such file.
    """
    bundled = Path(str(files("marval"))) / "assets" / f"{file}.safetensors"
    path = bundled if bundled.is_file() else Path(file)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: make a classifier with marval train-classifier")
    return path


def load_classifier(file: Path | str) -> Classifier:
    """Read a classifier (see `classifier_file`).

    Raises:
        ValueError: no such file, or not a classifier.
    """
    path = classifier_file(file)
    try:
        with safe_open(path, framework="pt") as content:
            about = json.loads((content.metadata() or {}).get("classifier", "null"))
            if about is None:
                raise ValueError(f"{path} is not a classifier: make one with marval train-classifier")
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error})") from None
    classifier = Classifier(about["architecture"], about["channels"], tuple(about["class_names"]))
    check_tensors(path, tensors, classifier.state_dict())
    classifier.load_state_dict(tensors, strict=True)
    return classifier.eval().requires_grad_(False)
