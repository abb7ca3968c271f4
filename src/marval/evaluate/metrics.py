"""Figures from features of drawn and real images: KID, precision and recall, density and coverage; the FD's bias.

Features in, numbers out. The Fréchet distance itself stands in `marval.evaluate.features`, beside its statistics.
"""

import warnings

import torch
from jaxtyping import Float
from torch import Tensor, nn

from marval.evaluate.features import Statistics, frechet_distance
from marval.randomness import generator

MOST = 10_000  # images of each side whose neighbours are sought: distances grow with the square
NEIGHBOURS = (3, 5)  # k of precision and recall, and of density and coverage
ROWS = 1000  # of a matrix of distances at a time


class Given(nn.Module):
    """torchmetrics asks a network for features: these are ready."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x


def kernel_distance(
    drawn: Float[Tensor, "n f"], real: Float[Tensor, "m f"], subsets: int = 20, subset_size: int = 1000
) -> float:
    """KID: the squared maximum mean discrepancy under a cubic kernel, unbiased (Binkowski et al. 2018), in float64.

    The mean over `subsets` random choices of `subset_size` images of each side, or of as many as there are.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(subset_size, len(drawn), len(real))
    with warnings.catch_warnings():  # it warns that it keeps the features, which are here anyway
        warnings.simplefilter("ignore")
        metric = KernelInceptionDistance(
            Given(drawn.shape[1]), subsets=subsets, subset_size=size, sync_on_compute=False
        )
    metric.update(real.double(), real=True)
    metric.update(drawn.double(), real=False)
    with torch.random.fork_rng(devices=[]):  # it draws subsets from the global stream
        torch.manual_seed(generator("kid").initial_seed())
        mean, _ = metric.compute()
    return float(mean)


def neighbour_figures(
    drawn: Float[Tensor, "n f"], real: Float[Tensor, "m f"], real_radius: Float[Tensor, "2 m"] | None = None
) -> dict[str, float]:
    """Precision, recall, density and coverage, from balls that reach to each image's k-th nearest neighbour.

    Precision is the share of drawn images within a real image's ball, recall the share of real images within a drawn
    image's ball (k = 3; Kynkäänniemi et al. 2019). Density counts the real balls that a drawn image lies in, over k;
    coverage is the share of real images with a drawn image in their ball (k = 5; Naeem et al. 2020). The first
    `MOST` images of each side.

    Args:
        real_radius: what `neighbour_distances` finds of the real images, where it is known.

    Raises:
        ValueError: fewer than 6 images on one side.
    """
    drawn, real = drawn[:MOST].double(), real[:MOST].double()
    if min(len(drawn), len(real)) <= max(NEIGHBOURS):
        raise ValueError(f"{len(drawn)} drawn and {len(real)} real images: expected at least 6 of each")
    near, dense = neighbour_distances(real) if real_radius is None else real_radius
    precise = density = 0.0
    recalled = torch.zeros(len(real), dtype=torch.bool)
    covered = torch.zeros(len(real), dtype=torch.bool)
    for part, radius in zip(drawn.split(ROWS), neighbour_distances(drawn)[0].split(ROWS), strict=True):
        distances = torch.cdist(part, real)
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
