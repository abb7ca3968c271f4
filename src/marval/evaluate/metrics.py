"""Figures from features of drawn and real images: KID, precision and recall, density and coverage; the FD's bias.

Features in, numbers out. The Fréchet distance itself stands in `marval.evaluate.features`, beside its statistics.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from marval.evaluate.features import ROWS, Statistics, frechet_distance
from marval.runtime.rng import generator

METRICS = 2  # the version of the figures' definitions: raise it when one changes, and say below what it was before
BEFORE = {2: {"diversity": "of the first 200 images of a class"}}  # version: what it changed, as it was until then
MOST = 10_000  # real images that drawn ones are compared with one by one: what distances take grows with them
NEIGHBOURS = (3, 5)  # k of precision and recall, and of density and coverage
FEWEST = max(NEIGHBOURS) + 1  # images that have such neighbours


@dataclass(frozen=True)
class RealSample:
    """Features of real images, with their neighbour distances and mean kernel."""

    features: Float[Tensor, "m f"]
    radius: Float[Tensor, "2 m"]  # see `neighbour_distances`
    kernel: Float[Tensor, ""]  # see `mean_kernel`

    @classmethod
    def of(cls, features: Float[Tensor, "n f"]) -> "RealSample":
        """Describe the first `MOST` images.

        Raises:
            ValueError: fewer than `FEWEST` images.
        """
        if len(features) < FEWEST:
            raise ValueError(
                f"{len(features)} real images: precision, recall, density and coverage need at least {FEWEST}, which "
                f"have {max(NEIGHBOURS)} neighbours; name more with --data"
            )
        features = features[:MOST]
        return cls(features, neighbour_distances(features), mean_kernel(features))

    def to(self, device: torch.device) -> "RealSample":
        """The same on another device."""
        return RealSample(self.features.to(device), self.radius.to(device), self.kernel.to(device))


def sample_figures(drawn: Float[Tensor, "n f"], real: RealSample) -> dict[str, float]:
    """Compute KID and `neighbour_figures` on the features' device.

    float64: of an accelerator without it, bring the features to the CPU.

    Raises:
        ValueError: fewer than `FEWEST` drawn images.
    """
    real = real.to(drawn.device)
    return {"kid": kernel_distance(drawn, real), **neighbour_figures(drawn, real)}


def changed_between(first: int, second: int) -> dict[str, str]:
    """Return the figures that two versions of the metrics define differently, each with its older definition."""
    changed: dict[str, str] = {}
    for version in range(min(first, second) + 1, max(first, second) + 1):
        changed = {**BEFORE.get(version, {}), **changed}
    return changed


def compute_device(device: torch.device) -> torch.device:
    """Choose where to compute distances between many images: the device if it has float64, else the CPU."""
    return device if device.type == "cuda" else torch.device("cpu")


def kernel_distance(drawn: Float[Tensor, "n f"], real: RealSample) -> float:
    """KID: the squared maximum mean discrepancy under the kernel (x.y / f + 1)^3 (Binkowski et al. 2018), in float64.

    The unbiased estimate on all images of both sides, of which there may be unequal numbers: means over random subsets,
    as they are often taken, estimate the same with more noise. It may fall below 0.

    Raises:
        ValueError: fewer than 2 images on one side.
    """
    if min(len(drawn), len(real.features)) < 2:
        raise ValueError(f"{len(drawn)} drawn and {len(real.features)} real images: expected at least 2 of each")
    between = torch.stack([_kernel(part, real.features).sum() for part in drawn.split(ROWS)]).sum()
    return float(mean_kernel(drawn) + real.kernel - 2 * between / (len(drawn) * len(real.features)))


def mean_kernel(features: Float[Tensor, "n f"]) -> Float[Tensor, ""]:
    """The mean of KID's kernel over all pairs of two different images, in float64."""
    pairs = torch.stack([_kernel(part, features).sum() for part in features.split(ROWS)]).sum()
    themselves = (features.double().square().mean(dim=1) + 1).pow(3).sum()
    return (pairs - themselves) / (len(features) * (len(features) - 1))


def _kernel(x: Float[Tensor, "n f"], y: Float[Tensor, "m f"]) -> Float[Tensor, "n m"]:
    return (x.double() @ y.double().T / x.shape[1] + 1).pow(3)


def neighbour_figures(drawn: Float[Tensor, "n f"], real: RealSample) -> dict[str, float]:
    """Precision, recall, density and coverage, from balls that reach to each image's k-th nearest neighbour.

    Precision is the share of drawn images within a real image's ball, recall the share of real images within a drawn
    image's ball (k = 3; Kynkäänniemi et al. 2019). Density counts the real balls that a drawn image lies in, over k;
    coverage is the share of real images with a drawn image in their ball (k = 5; Naeem et al. 2020).

    Raises:
        ValueError: fewer than 6 images on one side.
    """
    if min(len(drawn), len(real.features)) < FEWEST:
        raise ValueError(f"{len(drawn)} drawn and {len(real.features)} real images: expected at least {FEWEST} of each")
    (near, dense), features = real.radius, real.features.double()
    precise = density = 0.0
    recalled, covered = torch.zeros(2, len(features), dtype=torch.bool, device=features.device)
    for part, radius in zip(drawn.split(ROWS), neighbour_distances(drawn)[0].split(ROWS), strict=True):
        distances = torch.cdist(part.double(), features)
        precise += float((distances <= near).any(dim=1).sum())
        within = distances <= dense
        density += float(within.sum()) / NEIGHBOURS[1]
        covered |= within.any(dim=0)
        recalled |= (distances <= radius[:, None]).any(dim=0)
    return {
        "precision": precise / len(drawn),
        "recall": float(recalled.double().mean()),
        "density": density / len(drawn),
        "coverage": float(covered.double().mean()),
    }


def neighbour_distances(features: Float[Tensor, "n f"]) -> Float[Tensor, "2 n"]:
    """Each image's distance to its 3rd and to its 5th nearest neighbour, in float64."""
    features, parts = features.double(), []
    for part in features.split(ROWS):
        nearest = torch.cdist(part, features).topk(max(NEIGHBOURS) + 1, dim=1, largest=False).values
        parts.append(nearest[:, list(NEIGHBOURS)])  # the first is the image itself
    return torch.cat(parts).T.contiguous()


def expected_bias(real: Statistics, count: int) -> float:
    """The Fréchet distance that `count` images of a perfect model would have, by drawing them.

    Drawn are features from the Gaussian that is fitted to the real ones: their true distance is 0, so what is found
    is what too few images add.
    """
    values, vectors = torch.linalg.eigh(real.covariance.double())
    root = vectors * values.clamp(min=0).sqrt()
    noise = torch.randn(count, len(real.mean), generator=generator("bias", count), dtype=torch.float64)
    return frechet_distance(real.mean + noise @ root.T, real)
