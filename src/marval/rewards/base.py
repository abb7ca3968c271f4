"""The reward protocol, rewards by name, and their weighted sum."""

import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from marval.io.files import sha256_of
from marval.io.own_code import OwnCode
from marval.rewards.aesthetic import load_aesthetic
from marval.rewards.classifier import ClassifierReward, load_classifier
from marval.rewards.clip import load_clip_reward, load_pickscore
from marval.rewards.hps import load_hps
from marval.rewards.image_reward import load_image_reward
from marval.rewards.text_image import load_text_image

# Prompts that were made for a class know it: see `marval.rewards.prompts.Prompt`.
Reward = Callable[[Float[Tensor, "b c h w"], Sequence[str]], Float[Tensor, " b"]]


def load_classifier_reward(source: str, device: torch.device | str) -> ClassifierReward:
    """The reward of a classifier's file, or of a bundled one by name."""
    return ClassifierReward(load_classifier(source).to(device))


@dataclass(frozen=True)
class About:
    """A reward that has a name: how to load it, from where unless told otherwise, and what to know of its weights."""

    load: Callable[[str, torch.device | str], Reward]
    source: str  # a hub id, or a bundled file's name
    what: str
    licence: str


KNOWN: dict[str, About] = {
    "pickscore": About(
        load_pickscore, "yuvalkirstain/PickScore_v1", "PickScore (arXiv 2305.01569): the paper's reward, about 20",
        "MIT (its code's; the weights' own card names none)",
    ),
    "clip": About(
        load_clip_reward, "openai/clip-vit-large-patch14", "CLIP score (arXiv 2104.08718): 100 x cosine; any CLIP",
        "MIT (OpenAI's CLIP; another checkpoint has its own)",
    ),
    "image-reward": About(
        load_image_reward, "zai-org/ImageReward", "ImageReward v1.0 (arXiv 2304.05977): about -2 to 2", "Apache-2.0",
    ),
    "hps-v2": About(
        load_hps, "xswu/HPSv2", "Human Preference Score v2.1 or v2 (arXiv 2306.09341): about 0.27", "Apache-2.0",
    ),
    "aesthetic": About(
        load_aesthetic, "trl-lib/ddpo-aesthetic-predictor", "LAION's improved aesthetic predictor: about 1 to 10",
        "Apache-2.0 (head), MIT (OpenAI's CLIP)",
    ),
    "text-image": About(
        load_text_image, "fashion-text-image", "cosine of picture and sentence, offline, for clothes; no CLIP score",
        "Apache-2.0 (EfficientNet-Lite0, all-MiniLM-L6-v2, and marval's own head)",
    ),
    "classifier": About(
        load_classifier_reward, "fashion-classifier", "log-probability of the class that the prompt names",
        "Apache-2.0 (marval's own)",
    ),
}  # fmt: skip


def find_reward(name: str, classifier: Path | None = None, device: torch.device | str = "cpu") -> Reward:
    """A reward by name, "clip"; by name and weights, "clip:FOLDER" or "clip:HUB-ID"; or your own, "file.py:function".

    What else a reward of one's own may be, `OwnCode` says.

    Args:
        classifier: the classifier's file; the bundled one for Fashion-MNIST when None.

    Raises:
        ValueError: an unknown name, weights that are not there, or as `OwnCode`.
    """
    kind, _, source = name.partition(":")
    if kind in KNOWN:
        known = KNOWN[kind]
        default = str(classifier) if kind == "classifier" and classifier is not None else known.source
        return known.load(source or default, device)
    own = OwnCode(name, "reward", KNOWN)
    if isinstance(own.function, nn.Module):
        own.function.to(device)
    return own


def reward_hash(reward: Reward) -> str:
    """SHA-256 of a reward's weights: names and values of all its tensors; of code without any, of its file.

    Empty where there is neither.
    """
    if isinstance(reward, OwnCode):
        return reward_hash(reward.function) or reward.sha256
    modules = {"": reward} if isinstance(reward, nn.Module) else getattr(reward, "__dict__", {})
    digest, tensors = hashlib.sha256(), 0
    for prefix, module in modules.items():
        if isinstance(module, nn.Module):
            for name, tensor in module.state_dict().items():
                digest.update(f"{prefix}.{name}".encode())
                digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
                tensors += 1
    if tensors:
        return digest.hexdigest()
    try:
        return sha256_of(Path(inspect.getfile(reward if inspect.isfunction(reward) else type(reward))))
    except (TypeError, OSError):  # compiled, or typed in
        return ""


def reward_identity(reward: Reward) -> str:
    """What tells one reward from another: names, factors, and the hashes of what they compute with."""
    name = getattr(reward, "__qualname__", type(reward).__qualname__)
    parts = reward.rewards if isinstance(reward, WeightedReward) else {name: (reward, 1.0)}
    return ",".join(f"{name}={weight:g} (sha256 {reward_hash(part)})" for name, (part, weight) in parts.items())


def parse_rewards(
    text: str, classifier: Path | None = None, device: torch.device | str = "cpu"
) -> dict[str, tuple[Reward, float]]:
    """Rewards and weights from "classifier", or "pickscore=1,clip:FOLDER=0.5"; the weight is 1 by default.

    Raises:
        ValueError: as `find_reward`, a weight that is no number, or a reward named twice.
    """
    parts: dict[str, tuple[Reward, float]] = {}
    for part in text.split(","):
        name, _, weight = part.strip().rpartition("=")
        if not name or ":" in weight:  # an equals sign in a path
            name, weight = part.strip(), ""
        try:
            if name in parts:
                raise ValueError(f"{name} is named twice")
            parts[name] = (find_reward(name, classifier, device), parse_weight(weight or "1"))
        except ValueError as error:
            raise ValueError(f"--reward {text}: {error}") from error
    return parts


def parse_weight(text: str) -> float:
    """A weight.

    Raises:
        ValueError: not a finite number.
    """
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ValueError(f"weight {text}: expected a number")
    return weight


def checked(name: str, reward: Reward, images: Float[Tensor, "b c h w"], prompts: Sequence[str]) -> Tensor:
    """What a reward says of images, if it may be used.

    Raises:
        ValueError: the reward has the wrong shape, no gradient, or a value that is not finite.
    """
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
    """The weighted sum of named rewards; a call checks what each returns, as `checked` says."""

    rewards: dict[str, tuple[Reward, float]]

    def __call__(self, images: Float[Tensor, "b c h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        total = torch.zeros(len(images), device=images.device)
        for name, (reward, weight) in self.rewards.items():
            total = total + weight * checked(name, reward, images, prompts)
        return total


@torch.no_grad()
def standardized(
    reward: Reward, images: Float[Tensor, "n c h w"], prompts: Sequence[str], batch_size: int = 32
) -> WeightedReward:
    """The same reward with each part minus its mean and over its standard deviation on `images`.

    So that parts of different scales share one sum as their weights say, and learning rate and anchor mean the same for
    every reward.

    Raises:
        ValueError: a part is the same for all images; or as `checked`.
    """
    parts = reward.rewards if isinstance(reward, WeightedReward) else {"reward": (reward, 1.0)}
    found: dict[str, tuple[Reward, float]] = {}
    for name, (part, weight) in parts.items():
        values = torch.cat(
            [
                checked(name, part, images[start : start + batch_size], prompts[start : start + batch_size])
                for start in range(0, len(images), batch_size)
            ]
        )
        mean, std = float(values.mean()), float(values.std())
        if not std > 0:
            raise ValueError(f"reward {name}: it is {mean:.4g} for all of {len(images)} images: nothing to normalize")
        found[name] = (Standardized(part, mean, std), weight)
    return WeightedReward(found)


@dataclass(frozen=True)
class Standardized:
    """`(reward - mean) / std`."""

    reward: Reward
    mean: float
    std: float

    def __call__(self, images: Float[Tensor, "b c h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        return (self.reward(images, prompts) - self.mean) / self.std
