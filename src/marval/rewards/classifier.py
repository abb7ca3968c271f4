"""Small image classifiers: `plain` serves as a reward, `residual` as the held-out judge that no reward sees."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from marval.rewards.weights import described_file, load_described, save_described

Architecture = Literal["plain", "residual"]
MAKER = "marval train classifier"


def plain_network(channels: int, classes: int) -> nn.Sequential:
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


def residual_network(channels: int, classes: int) -> nn.Sequential:
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

    def hidden(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b f"]:
        """The last hidden layer, of which the logits are a linear function."""
        return self.network[:-1](images * 2 - 1)

    def log_probability(self, images: Float[Tensor, "b c h w"], labels: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Log-probability of each image's class, in nats."""
        return self(images).log_softmax(dim=1).gather(1, labels[:, None])[:, 0]


class ClassifierReward:
    """Log-probability of the class that the prompt was made for; the prompt's text does not matter."""

    def __init__(self, classifier: Classifier):
        self.classifier = classifier.eval().requires_grad_(False)

    def __call__(self, images: Float[Tensor, "b c h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        names, known = [getattr(prompt, "class_name", "") for prompt in prompts], self.classifier.class_names
        for name, prompt in zip(names, prompts, strict=True):
            if name not in known:
                raise ValueError(
                    f"the classifier does not know the class {name!r} of the prompt {str(prompt)!r}: it tells "
                    f"{', '.join(known[:10])} apart; make one with {MAKER}, then --reward classifier:FILE"
                )
        labels = torch.tensor([known.index(name) for name in names], device=images.device)
        return self.classifier.log_probability(images, labels)


def load_classifier_reward(source: str, device: torch.device | str = "cpu") -> ClassifierReward:
    """Load the reward of a classifier's file, or of a bundled one by name."""
    return ClassifierReward(load_classifier(source).to(device))


def save_classifier(file: Path, classifier: Classifier, figures: dict[str, object]) -> None:
    """Write a classifier and its figures (accuracy, epochs, ...) to one safetensors file."""
    about = {name: getattr(classifier, name) for name in ("architecture", "channels", "class_names")}
    save_described(file, classifier, "classifier", {**about, "figures": figures})


def classifier_file(name: Path | str) -> Path:
    """Find a classifier: a bundled one by name ("fashion-classifier", "fashion-judge"), or a file."""
    return described_file(name, MAKER)


def load_classifier(name: Path | str) -> Classifier:
    """Read a classifier: a bundled one by name, or a file."""

    def build(about: dict[str, Any]) -> Classifier:
        return Classifier(about["architecture"], about["channels"], tuple(about["class_names"]))

    return load_described(classifier_file(name), build, "classifier", MAKER)
