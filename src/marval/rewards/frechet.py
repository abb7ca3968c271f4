"""`fd`: the Fréchet distance to the real images as a reward. Of a whole batch, which it must see before it is asked."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from marval.losses.frechet import FrechetDistance, Moments, frechet_distance, frechet_first_order
from marval.runtime.distributed import Workers

DIRECTIONS = 256  # of the features, among which covariances count


class RealMoments(NamedTuple):
    """The real images' mean, the directions in which they vary (columns, the widest first), and the variances."""

    mean: Float[Tensor, " f"]
    directions: Float[Tensor, "f f"]
    variances: Float[Tensor, " f"]

    @classmethod
    def of(cls, mean: Float[Tensor, " f"], covariance: Float[Tensor, "f f"]) -> "RealMoments":
        """Decompose a covariance, in float64: other threads may give other directions, so one process does it."""
        values, vectors = torch.linalg.eigh(covariance.double())  # ascending
        return cls(mean.double(), vectors.flip(1).contiguous(), values.flip(0).clamp(min=0))


class RunningMoments(nn.Module):
    """Exponential averages of drawn images' moments, without the bias of an average's start; in float64.

    Kinds of images that take turns (those of several K) have averages of their own. With them go the real images'
    moments, whose directions are the axes: a resumed run needs all. Only the axes are on the device.
    """

    real_mean: Tensor
    directions: Tensor
    variances: Tensor
    weight: Tensor
    mean: Tensor
    products: Tensor
    squares: Tensor
    start: Tensor

    def __init__(self, real: RealMoments, decay: float, device: torch.device | str, turns: int = 1):
        super().__init__()
        self.decay, width, size = decay, len(real.mean), min(DIRECTIONS, len(real.mean))
        buffers = {
            "real_mean": real.mean.to(device), "directions": real.directions.to(device), "variances": real.variances,
            "weight": torch.zeros(turns), "mean": torch.zeros(turns, width), "products": torch.zeros(turns, size, size),
            "squares": torch.zeros(turns, width - size),
            "start": torch.zeros(turns),  # the distance of the student that was not tuned yet
        }  # fmt: skip
        for name, value in buffers.items():
            self.register_buffer(name, value.double())

    def add(self, features: Float[Tensor, "n f"], turn: int = 0) -> None:
        """Take a batch of features along the axes."""
        size, share = self.products.shape[1], 1 - self.decay
        first, others = features[:, :size], features[:, size:]
        self.weight[turn].lerp_(torch.ones_like(self.weight[turn]), share)
        self.mean[turn].lerp_(features.mean(dim=0), share)
        self.products[turn].lerp_(first.mT @ first / len(features), share)
        self.squares[turn].lerp_(others.square().mean(dim=0), share)

    def now(self, turn: int = 0) -> Moments:
        """Return mean, covariances and variances of what was taken."""
        weight, size = self.weight[turn], self.products.shape[1]
        mean = self.mean[turn] / weight
        covariance = self.products[turn] / weight - mean[:size, None] * mean[:size]
        return Moments(mean, covariance, (self.squares[turn] / weight - mean[size:].square()).clamp(min=0))


class FrechetReward:
    """Minus the Fréchet distance over that of the student at the start, to first order in each image's features.

    Its mean over a batch has the distance's gradient, up to a constant factor (`frechet_first_order`). The moments are
    averages over updates, the current batch included.

    Args:
        name: the feature space's.
        network: features of images in [0, 255] by `of_values`, where it computes.
        real: the real images' moments.
        decay: of the averages, in every update.
        identity: says which features and which data; a resumed run must have the same.
        device: where images and network are.
        turns: kinds of images that take turns, each with its own distance.
    """

    def __init__(
        self, name: str, network: Any, real: RealMoments, decay: float, identity: str = "",
        device: torch.device | str = "cpu", turns: int = 1,
    ):  # fmt: skip
        self.name, self.network = name, network
        self.moments = RunningMoments(real, decay, device, turns)
        self.sha256 = hashlib.sha256(identity.encode()).hexdigest()
        self.seen: list[tuple[Tensor, Tensor]] = []  # this process's images of the batch, and their features

    def observe(
        self, parts: Sequence[Float[Tensor, "_ c h w"]], workers: Workers, starting: bool,
        others: Sequence[Float[Tensor, "_ c h w"]] = (), turn: int = 0,
    ) -> float:  # fmt: skip
        """Take a batch, of which this process has some parts, and return the distance.

        Args:
            starting: the student has not learned yet; later distances are divided by this one.
            others: more images of the update, which count in the moments, and which no gradient is for.
            turn: the kind of all these images.

        Raises:
            ValueError: some features are not finite.
        """
        self.seen = workers.together(self.features_of, parts)
        with torch.no_grad():
            counted = [*self.seen, *workers.together(self.features_of, others)]
        self.moments.add(workers.gather(torch.cat([features.detach() for _, features in counted])), turn)
        drawn = self.moments.now(turn)
        at = frechet_distance(drawn, self.moments.variances)
        if starting or not self.moments.start[turn]:
            self.moments.start[turn] = at.distance
        self.start = self.moments.start[turn]
        device = self.moments.directions.device
        self.drawn = Moments(*(moment.to(device) for moment in drawn))
        self.at = FrechetDistance(at.distance.to(device), Moments(*(slope.to(device) for slope in at.slopes)))
        return float(at.distance)

    def features_of(self, parts: Sequence[Float[Tensor, "_ c h w"]]) -> list[tuple[Tensor, Tensor]]:
        """Images with their features along the axes; of several parts, memory holds one's activations at a time."""
        along = self.along_axes if len(parts) == 1 else recomputed(self.along_axes)
        seen = [(images, along(images)) for images in parts]
        if not all(features.isfinite().all() for _, features in seen):
            raise ValueError(f"reward fd:{self.name}: some features of the drawn images are not finite")
        return seen

    def along_axes(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b f"]:
        """Features along the real images' principal directions, from the real mean."""
        features = self.network.of_values(images * 255).double()
        return (features - self.moments.real_mean) @ self.moments.directions

    def __call__(self, images: Float[Tensor, "b c h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        features = next((features for seen, features in self.seen if seen is images), None)
        if features is None:
            raise ValueError(f"reward fd:{self.name}: it is of a whole batch, which observe() must have seen")
        return -(frechet_first_order(features, self.drawn, self.at) / self.start.to(features)).float()


def recomputed(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function, which the backward pass computes again, so that memory need not hold it."""
    return functools.partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
