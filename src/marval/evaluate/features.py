"""Image features and statistics of them: EfficientNet-Lite0 (ImageNet weights, packaged, offline), or the user's own.

A Fréchet distance on EfficientNet's features is called FD-EfficientNet: it is not FID, and compares with nothing else.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from marval.io.files import asset, write_tensors
from marval.io.own_code import OwnCode
from marval.rewards.efficientnet import FEATURES, EfficientNetFeatures

FASHION_STATISTICS = asset("fashion-mnist-statistics.safetensors")
ROWS = 1000  # of a matrix of distances at a time


class OwnFeatures(nn.Module):
    """Features (B, F) of byte images (B, C, H, W) by a function or module of the user's, checked.

    They are named after it and the SHA-256 of its file, so that statistics made by another version are refused.
    """

    prefix = "own"  # of the names of figures that are measured on them

    def __init__(self, own: OwnCode):
        super().__init__()
        self.function = own.function  # where it is a module it moves with this one
        self.own, self.name = own, f"{own.spec} ({own.sha256[:12]})"

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b f"]:
        rows = self.own(images)
        if not isinstance(rows, Tensor) or rows.ndim != 2 or len(rows) != len(images):
            shape = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(f"features {self.name}: returned {shape}, expected ({len(images)}, features)")
        if not rows.isfinite().all():
            raise ValueError(f"features {self.name}: some are not finite")
        return rows.float()


Features = EfficientNetFeatures | OwnFeatures


def find_features(spec: str | None = None) -> Features:
    """EfficientNet's features when None, else those of "file.py:function" or "module:function".

    The function takes byte images (B, C, H, W) and returns features (B, F); a class is called without arguments.
    """
    return EfficientNetFeatures() if spec is None else OwnFeatures(OwnCode(spec, "--features"))


@torch.inference_mode()
def extract(network: nn.Module, images: UInt8[Tensor, "n c h w"], batch_size: int = 100) -> Float[Tensor, "n f"]:
    """Features of many images, batch by batch."""
    weights = next(network.parameters(), None)
    device = torch.device("cpu") if weights is None else weights.device
    return torch.cat([network(part.to(device)).cpu() for part in images.split(batch_size)])


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features, of how many images, which features, and the SHA-256 of the images' bytes."""

    mean: Float[Tensor, " f"]
    covariance: Float[Tensor, "f f"]
    count: int
    features: str = FEATURES
    data_sha256: str = ""  # not known

    @classmethod
    def of(cls, parts: Iterable[Float[Tensor, "_ f"]], features: str = FEATURES, data_sha256: str = "") -> "Statistics":
        """The statistics of features that come in parts, summed in float64.

        Raises:
            ValueError: fewer than 2 images, or features that are not finite.
        """
        count, total, outer = 0, torch.tensor(0.0), torch.tensor(0.0)
        for part in parts:
            part = part.double()
            count, total, outer = count + len(part), total + part.sum(dim=0), outer + part.T @ part
        if count < 2:
            raise ValueError(f"{count} real images: a Fréchet distance needs at least 2; name more with --data")
        mean = total / count
        if not mean.isfinite().all():
            raise ValueError(f"features {features}: some of the real images' are not finite")
        return cls(mean, (outer - count * mean[:, None] * mean) / (count - 1), count, features, data_sha256)

    def save(self, file: Path) -> None:
        """Write mean and upper triangle in float32."""
        rows, columns = torch.triu_indices(*self.covariance.shape).unbind()
        tensors = {"mean": self.mean.float(), "covariance": self.covariance[rows, columns].float()}
        about = {"features": self.features, "count": str(self.count), "data_sha256": self.data_sha256}
        write_tensors(file, tensors, about)

    @classmethod
    def load(cls, file: Path, features: str = FEATURES) -> "Statistics":
        """Read what `save` wrote, of these features.

        Raises:
            ValueError: no such file, a damaged one, or statistics of other features.
        """
        try:
            with safe_open(file, framework="pt") as content:
                about = content.metadata() or {}
                if about.get("features") != features:
                    raise ValueError(
                        f"{file} has features {about.get('features')!r}, expected {features!r}: name other statistics"
                    )
                mean, triangle = content.get_tensor("mean").double(), content.get_tensor("covariance").double()
                rows, columns = torch.triu_indices(len(mean), len(mean)).unbind()
                covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
                covariance[rows, columns] = triangle
                covariance[columns, rows] = triangle
                return cls(mean, covariance, int(about["count"]), features, about.get("data_sha256", ""))
        except (OSError, SafetensorError, RuntimeError, KeyError) as error:
            raise ValueError(f"{file} cannot be read as feature statistics ({error})") from None


def frechet_distance(features: Float[Tensor, "n f"], real: Statistics) -> float:
    """Fréchet distance between Gaussians fitted to `features` and to the real images (Heusel et al. 2017), in float64.

    `|m - m_r|^2 + trace(S + S_r) - 2 trace((S S_r)^(1/2))`; with A A^T = S (the centred features) and B B^T = S_r the
    last trace is the sum of the singular values of A^T B.
    """
    x = features.double()
    centred = (x - x.mean(dim=0)) / (len(x) - 1) ** 0.5
    values, vectors = torch.linalg.eigh(real.covariance.double())
    root = vectors * values.clamp(min=0).sqrt()
    if len(x) > x.shape[1]:  # a smaller matrix with the same singular values
        centred = torch.linalg.qr(centred, mode="r").R
    between = torch.linalg.svdvals(centred @ root).sum()
    distance = (x.mean(dim=0) - real.mean).square().sum() + centred.square().sum() + values.sum() - 2 * between
    return float(distance)


def diversity_within_class(features: Float[Tensor, "n f"], labels: Tensor) -> float:
    """Mean Euclidean distance between features of two images of a class, averaged over classes; in float64.

    All images count. Classes with a single image have no pair; NaN where all are such.
    """
    classes, counts = labels.unique(return_counts=True)
    means = [_mean_distance(features[labels == label].double()) for label in classes[counts > 1]]
    return float(torch.stack(means).mean()) if means else math.nan


def _mean_distance(x: Float[Tensor, "n f"]) -> Float[Tensor, ""]:
    total = torch.zeros((), dtype=x.dtype)
    for start in range(0, len(x), ROWS):
        distances = torch.cdist(x[start : start + ROWS], x)
        total += distances.sum() - distances.diagonal(start).sum()  # rounding leaves an image a distance to itself
    return total / (len(x) * (len(x) - 1))
