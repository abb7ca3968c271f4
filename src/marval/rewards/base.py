"""The reward protocol, rewards by name, and their weighted sum."""

import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from marval.io.files import sha256_of
from marval.io.own_code import OwnCode
from marval.rewards.classifier import load_classifier_reward
from marval.rewards.clip import load_aesthetic, load_clip, load_pickscore
from marval.rewards.frechet import FrechetReward
from marval.rewards.hps import load_hps
from marval.rewards.image_reward import load_image_reward
from marval.rewards.text_image import load_text_image
from marval.rewards.weights import CLIP


@runtime_checkable
class Reward(Protocol):
    """Any function of images in [0, 1] and their prompts that returns one number per image, differentiable in them."""

    def __call__(self, images: Float[Tensor, "b c h w"], prompts: Sequence[str], /) -> Float[Tensor, " b"]: ...


# Named rewards: how to load each (from a source, onto a device), and its source where none is named: a hub id, or a
# bundled file's name.
KNOWN: dict[str, tuple[Callable[[str, torch.device | str], Reward], str]] = {
    "pickscore": (load_pickscore, "yuvalkirstain/PickScore_v1"),
    "clip": (load_clip, CLIP),
    "image-reward": (load_image_reward, "zai-org/ImageReward"),
    "hps-v2": (load_hps, "xswu/HPSv2"),
    "aesthetic": (load_aesthetic, "trl-lib/ddpo-aesthetic-predictor"),
    "text-image": (load_text_image, "fashion-text-image"),
    "classifier": (load_classifier_reward, "fashion-classifier"),
}


# Makes the reward "fd:NAME" of a feature space's name: it knows the real images.
DistanceTo = Callable[[str], FrechetReward]


def find_reward(name: str, device: torch.device | str = "cpu", distance: DistanceTo | None = None) -> Reward:
    """Load a reward: "clip"; with other weights, "clip:FOLDER" or "clip:HUB-ID"; or your own, "file.py:function".

    Args:
        distance: what "fd:SPACE" is made by, in tuning.

    Raises:
        ValueError: an unknown name, weights that are not there, or as `OwnCode`.
    """
    kind, _, source = name.partition(":")
    if kind == "fd":
        if distance is None:
            raise ValueError(f"{name} is a distance of many images, which tune --reward alone takes; expected another")
        return distance(source or "efficientnet")
    if kind in KNOWN:
        load, default = KNOWN[kind]
        return load(source or default, device)
    own = OwnCode(name, "reward", [*KNOWN, "fd:SPACE"])
    if isinstance(own.function, nn.Module):
        own.function.to(device)
    return own


def parse_rewards(
    text: str, device: torch.device | str = "cpu", distance: DistanceTo | None = None
) -> dict[str, tuple[Reward, float]]:
    """Load rewards with their weights: "classifier", or "pickscore=1,clip:FOLDER=0.5"; the weight is 1 by default.

    Args:
        distance: see `find_reward`.

    Raises:
        ValueError: as `find_reward`, a weight that is no number, or a reward named twice.
    """
    try:
        weights: dict[str, float] = {}  # all are read before anything is loaded
        for part in text.split(","):
            name, _, weight = part.strip().partition("=")
            if name in weights:
                raise ValueError(f"{name} is named twice")
            weights[name] = float(weight or 1)
            if not math.isfinite(weights[name]):
                raise ValueError(f"the weight {weight} of {name}: expected a finite number")
        return {name: (find_reward(name, device, distance), weight) for name, weight in weights.items()}
    except ValueError as error:
        raise ValueError(f"--reward {text}: {error}") from error


def reward_hash(reward: Reward) -> str:
    """SHA-256 of a reward's weights, or of the file of code without weights; "" where there is neither."""
    if isinstance(reward, FrechetReward):
        return reward.sha256
    if isinstance(reward, OwnCode):
        return reward_hash(reward.function) or reward.sha256
    modules = {"": reward} if isinstance(reward, nn.Module) else getattr(reward, "__dict__", {})
    digest = hashlib.sha256()
    empty = digest.digest()
    for prefix, module in modules.items():
        for name, tensor in module.state_dict().items() if isinstance(module, nn.Module) else ():
            digest.update(f"{prefix}.{name}".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    if digest.digest() != empty:
        return digest.hexdigest()
    try:
        return sha256_of(Path(inspect.getfile(reward if inspect.isfunction(reward) else type(reward))))
    except (TypeError, OSError):  # compiled, or typed in
        return ""


def checked(name: str, reward: Reward, images: Float[Tensor, "b c h w"], prompts: Sequence[str]) -> Tensor:
    """Call a reward, and check that it returns finite numbers, one per image, whose gradient reaches the images."""
    value = reward(images, prompts)
    if not isinstance(value, Tensor) or value.shape != (len(images),):
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"reward {name}: returned {shape}, expected one number per image ({len(images)},)")
    if images.requires_grad and not value.requires_grad:
        raise ValueError(f"reward {name}: no gradient reaches the images; it must be differentiable")
    if not torch.isfinite(value).all():
        prompt = prompts[int((~torch.isfinite(value)).int().argmax())]
        raise ValueError(f"reward {name}: not finite for the prompt {prompt!r}")
    return value


@dataclass(frozen=True)
class WeightedReward:
    """The weighted sum of named rewards, each of them `checked`."""

    rewards: dict[str, tuple[Reward, float]]

    def __call__(self, images: Float[Tensor, "b c h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        total = torch.zeros(len(images), device=images.device)
        for name, (reward, weight) in self.rewards.items():
            total = total + weight * checked(name, reward, images, prompts)
        return total


def parts_of(reward: Reward) -> dict[str, tuple[Reward, float]]:
    """The rewards of a sum with their weights, by name; any other reward with the weight 1."""
    name = getattr(reward, "__qualname__", type(reward).__qualname__)
    return reward.rewards if isinstance(reward, WeightedReward) else {name: (reward, 1.0)}


def reward_identity(reward: Reward) -> str:
    """Describe a reward for a resumed run to compare: names, weights in the sum, and the hashes of what they run."""
    parts = parts_of(reward).items()
    return ",".join(f"{name}={weight:g} (sha256 {reward_hash(part)})" for name, (part, weight) in parts)
