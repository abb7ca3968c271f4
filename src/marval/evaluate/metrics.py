"""Figures from features of drawn and real images: KID, precision and recall; and the Fréchet distance's bias.

Features in, numbers out. The Fréchet distance itself stands in `marval.evaluate.features`, beside its statistics.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from marval.evaluate.features import ROWS, Statistics, frechet_distance
from marval.runtime.rng import generator

METRICS = 2  # the version of the figures' definitions: raise it when one changes
REDEFINED = {"diversity": 2}  # and by which version: 1 took the first 200 images of a class
MOST = 10_000  # real images that drawn ones are compared with one by one: what distances take grows with them
NEIGHBOUR = 3  # k of precision and recall
FEWEST = NEIGHBOUR + 1  # images that have such a neighbour


@dataclass(frozen=True)
class RealSample:
    """Features of real images, with their neighbour distances and mean kernel."""

    features: Float[Tensor, "m f"]
    radius: Float[Tensor, " m"]  # see `neighbour_distances`
    kernel: Float[Tensor, ""]  # see `mean_kernel`

    @classmethod
    def of(cls, features: Float[Tensor, "n f"]) -> "RealSample":
        """Describe the first `MOST` images.

        Raises:
            ValueError: fewer than `FEWEST` images.
        """
        if len(features) < FEWEST:
            raise ValueError(
                f"{len(features)} real images: precision and recall need at least {FEWEST}; name more with --data"
            )
        features = features[:MOST]
        return cls(features, neighbour_distances(features), mean_kernel(features))


def sample_figures(drawn: Float[Tensor, "n f"], real: RealSample, device: torch.device | str) -> dict[str, float]:
    """Compute KID, precision and recall, in float64: on the device if that is CUDA, else on the CPU.

    Raises:
        ValueError: fewer than `FEWEST` drawn images.
    """
    device = device if torch.device(device).type == "cuda" else "cpu"
    drawn = drawn.to(device)
    real = RealSample(real.features.to(device), real.radius.to(device), real.kernel.to(device))
    precision, recall = precision_and_recall(drawn, real)
    return {"kid": kernel_distance(drawn, real), "precision": precision, "recall": recall}


def kernel_distance(drawn: Float[Tensor, "n f"], real: RealSample) -> float:
    """KID: the squared maximum mean discrepancy under the kernel (x.y / f + 1)^3 (Binkowski et al. 2018), in float64.

    The unbiased estimate on all images of both sides, of which there may be unequal numbers: means over random subsets,
    as they are often taken, estimate the same with more noise. It may fall below 0.
    """
    between = torch.stack([_kernel(part, real.features).sum() for part in drawn.split(ROWS)]).sum()
    return float(mean_kernel(drawn) + real.kernel - 2 * between / (len(drawn) * len(real.features)))


def mean_kernel(features: Float[Tensor, "n f"]) -> Float[Tensor, ""]:
    """The mean of KID's kernel over all pairs of two different images, in float64."""
    pairs = torch.stack([_kernel(part, features).sum() for part in features.split(ROWS)]).sum()
    themselves = (features.double().square().mean(dim=1) + 1).pow(3).sum()
    return (pairs - themselves) / (len(features) * (len(features) - 1))


def _kernel(x: Float[Tensor, "n f"], y: Float[Tensor, "m f"]) -> Float[Tensor, "n m"]:
    return (x.double() @ y.double().T / x.shape[1] + 1).pow(3)


def precision_and_recall(drawn: Float[Tensor, "n f"], real: RealSample) -> tuple[float, float]:
    """The shares of drawn images within a real image's ball, and of real ones within a drawn image's ball.

    A ball reaches to an image's third nearest neighbour on its side (Kynkäänniemi et al. 2019).

    Raises:
        ValueError: fewer than `FEWEST` drawn images.
    """
    if len(drawn) < FEWEST:
        raise ValueError(f"{len(drawn)} drawn images: expected at least {FEWEST}")
    features, precise = real.features.double(), 0
    recalled = torch.zeros(len(features), dtype=torch.bool, device=features.device)
    for part, radius in zip(drawn.split(ROWS), neighbour_distances(drawn).split(ROWS), strict=True):
        distances = torch.cdist(part.double(), features)
        precise += int((distances <= real.radius).any(dim=1).sum())
        recalled |= (distances <= radius[:, None]).any(dim=0)
    return precise / len(drawn), float(recalled.double().mean())


def neighbour_distances(features: Float[Tensor, "n f"]) -> Float[Tensor, " n"]:
    """Each image's distance to its third nearest neighbour, in float64."""
    features = features.double()
    parts = [torch.cdist(part, features).topk(FEWEST, largest=False).values[:, -1] for part in features.split(ROWS)]
    return torch.cat(parts)  # the nearest of all is the image itself


def expected_bias(real: Statistics, count: int) -> float:
    """The Fréchet distance that `count` images of a perfect model would have, by drawing them.

    Drawn are features from the Gaussian that is fitted to the real ones: their true distance is 0, so what is found
    is what too few images add.
    """
    values, vectors = torch.linalg.eigh(real.covariance.double())
    root = vectors * values.clamp(min=0).sqrt()
    noise = torch.randn(count, len(real.mean), generator=generator("bias", count), dtype=torch.float64)
    return frechet_distance(real.mean + noise @ root.T, real)
