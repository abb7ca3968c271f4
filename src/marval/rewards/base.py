"""The reward protocol, rewards by name, and their weighted sum."""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from marval.rewards.classifier import ClassifierReward, load_classifier

Reward = Callable[[Float[Tensor, "b c h w"], Sequence[str]], Float[Tensor, " b"]]

KNOWN_REWARDS = ("classifier",)


def find_reward(name: str, classifier: Path | None = None, device: torch.device | str = "cpu") -> Reward:
    """A reward by name: "classifier", or a function of the user's as "package.module:function".

    Args:
        classifier: the classifier's file; the bundled one for Fashion-MNIST when None.

    Raises:
        ValueError: an unknown name, a module that cannot be imported, or no such function in it.
    """
    if name == "classifier":
        return ClassifierReward(load_classifier(classifier or "fashion-classifier").to(device))
    module_name, _, function = name.partition(":")
    if not function:
        raise ValueError(f"unknown reward {name!r}: expected {', '.join(KNOWN_REWARDS)}, or package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"reward {name!r}: cannot import {module_name} ({error})") from error
    if not callable(getattr(module, function, None)):
        raise ValueError(f"reward {name!r}: {module_name} has no function {function}")
    return getattr(module, function)


def parse_rewards(
    text: str, classifier: Path | None = None, device: torch.device | str = "cpu"
) -> dict[str, tuple[Reward, float]]:
    """Rewards and weights from "classifier", or "classifier=1,my_rewards:brightness=0.5"; the weight is 1 by default.

    Raises:
        ValueError: as `find_reward`, or a weight that is no number.
    """
    parts = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        try:
            parts[name] = (find_reward(name, classifier, device), float(weight or 1))
        except ValueError as error:
            raise ValueError(f"--reward {text}: {error}") from error
    return parts


def weighted_reward(rewards: dict[str, tuple[Reward, float]]) -> Reward:
    """The weighted sum of named rewards; checks what each returns.

    Raises (when called):
        ValueError: a reward has the wrong shape, no gradient, or a value that is not finite.
    """

    def combined(images: Float[Tensor, "b c h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        total = torch.zeros(len(images), device=images.device)
        for name, (reward, weight) in rewards.items():
            value = reward(images, prompts)
            if not isinstance(value, Tensor) or value.shape != (len(images),):
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"reward {name}: returned {shape}, expected one number per image ({len(images)},)")
            if images.requires_grad and not value.requires_grad:
                raise ValueError(f"reward {name}: no gradient reaches the images; it must be differentiable")
            if not torch.isfinite(value).all():
                prompt = prompts[int((~torch.isfinite(value)).int().argmax())]
                raise ValueError(f"reward {name}: not finite for the prompt {prompt!r}")
            total = total + weight * value
        return total

    return combined
