"""Image features and figures of them: EfficientNet-Lite0 (ImageNet weights, packaged, offline), others, your own.

A Fréchet distance on EfficientNet's features is called FD-EfficientNet: it is not FID, and compares with nothing else.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped, UInt8
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from marval.io.files import asset, sha256_of, write_tensors
from marval.io.own_code import OwnCode
from marval.rewards.classifier import classifier_file, load_classifier
from marval.rewards.efficientnet import FEATURES, EfficientNetFeatures

FASHION_STATISTICS = asset("fashion-mnist-statistics.safetensors")
ROWS = 1000  # of a matrix of distances at a time
METRICS = 2  # the version of the figures' definitions: raise it when one changes (1: other images in the diversity)
MOST = 10_000  # real images that drawn ones are compared with one by one: what distances take grows with them
FEWEST = 4  # images that have a third nearest neighbour, the k = 3 of precision and recall


class OwnFeatures(nn.Module):
    """Features (B, F) of byte images (B, C, H, W) by a function or module of the user's, named with its SHA-256."""

    prefix = "own"  # of the names of figures that are measured on them

    def __init__(self, own: OwnCode):
        super().__init__()
        self.function = own.function  # where it is a module it moves with this one
        self.own, self.name = own, f"{own.spec} ({own.sha256[:12]})"

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b f"]:
        return self.of_values(images)

    def of_values(self, images: Shaped[Tensor, "b c h w"]) -> Float[Tensor, "b f"]:
        """The features of images in [0, 255], which need not be bytes."""
        rows = self.own(images)
        if not isinstance(rows, Tensor) or rows.ndim != 2 or len(rows) != len(images):
            shape = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(f"features {self.name}: returned {shape}, expected ({len(images)}, features)")
        if not rows.isfinite().all():
            raise ValueError(f"features {self.name}: some are not finite")
        return rows.float()


class ClassifierFeatures(nn.Module):
    """The last hidden layer (B, F) of a classifier of `marval train classifier`, of byte images (B, C, H, W)."""

    prefix = "classifier"

    def __init__(self, file: str):
        super().__init__()
        self.network = load_classifier(file)
        self.name = f"{Path(file).stem} ({sha256_of(classifier_file(file))[:12]}), last hidden layer"

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b f"]:
        return self.of_values(images.float())

    def of_values(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b f"]:
        """The features of images in [0, 255], differentiable in them."""
        if images.shape[1] != self.network.channels:
            raise ValueError(
                f"features {self.name}: for {self.network.channels} channels, the images have {images.shape[1]}"
            )
        return self.network.hidden(images / 255)


class PixelFeatures(nn.Module):
    """The pixels themselves (B, F) of byte images (B, C, H, W), averaged to 32 x 32 where there are more."""

    name = "pixels, at most 32x32"
    prefix = "pixels"

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b f"]:
        return self.of_values(images.float())

    def of_values(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b f"]:
        """The features of images in [0, 255], differentiable in them."""
        height, width = images.shape[2:]
        return F.adaptive_avg_pool2d(images / 255, (min(height, 32), min(width, 32))).flatten(1)


Features = EfficientNetFeatures | OwnFeatures | ClassifierFeatures | PixelFeatures
SPACES = ("efficientnet", "classifier:FILE", "pixels")


def find_features(spec: str | None = None, option: str = "--features") -> Features:
    """EfficientNet's features when None; else "efficientnet", "classifier", "classifier:FILE", "pixels", or your own.

    Your own are those of "file.py:function" or "module:function".

    Args:
        option: what the name was given for.

    Raises:
        ValueError: an unknown name, no such file, or as `OwnCode`.
    """
    kind, _, file = (spec or "efficientnet").partition(":")
    if kind == "classifier":
        return ClassifierFeatures(file or "fashion-classifier")
    named: dict[str, Callable[[], Features]] = {"efficientnet": EfficientNetFeatures, "pixels": PixelFeatures}
    if kind in named and not file:
        return named[kind]()
    return OwnFeatures(OwnCode(spec or "", option, SPACES))


@torch.inference_mode()
def extract(network: nn.Module, images: UInt8[Tensor, "n c h w"], batch_size: int = 100) -> Float[Tensor, "n f"]:
    """Features of many images, batch by batch."""
    weights = next(network.parameters(), None)
    device = torch.device("cpu") if weights is None else weights.device
    return torch.cat([network(part.to(device)).cpu() for part in images.split(batch_size)])


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features, in float64: whose, and the SHA-256 of the images' bytes."""

    mean: Float[Tensor, " f"]
    covariance: Float[Tensor, "f f"]
    features: str = FEATURES
    data_sha256: str = ""  # not known

    @classmethod
    def of(cls, parts: Iterable[Float[Tensor, "_ f"]], features: str = FEATURES, data_sha256: str = "") -> "Statistics":
        """The statistics of features that come in parts, summed in float64."""
        count, total, outer = 0, torch.tensor(0.0), torch.tensor(0.0)
        for part in parts:
            part = part.double()
            count, total, outer = count + len(part), total + part.sum(dim=0), outer + part.T @ part
        if count < 2:
            raise ValueError(f"{count} real images: a Fréchet distance needs at least 2; name more with --data")
        mean = total / count
        if not mean.isfinite().all():
            raise ValueError(f"features {features}: some of the real images' are not finite")
        return cls(mean, (outer - count * mean[:, None] * mean) / (count - 1), features, data_sha256)

    def save(self, file: Path) -> None:
        """Write mean and upper triangle in float32."""
        rows, columns = torch.triu_indices(*self.covariance.shape).unbind()
        tensors = {"mean": self.mean.float(), "covariance": self.covariance[rows, columns].float()}
        write_tensors(file, tensors, {"features": self.features, "data_sha256": self.data_sha256})

    @classmethod
    def load(cls, file: Path) -> "Statistics":
        """Read what `save` wrote; what `safetensors` raises where there is no such file or a damaged one."""
        with safe_open(file, framework="pt") as content:
            about, mean = content.metadata(), content.get_tensor("mean").double()
            rows, columns = torch.triu_indices(len(mean), len(mean)).unbind()
            covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
            covariance[rows, columns] = covariance[columns, rows] = content.get_tensor("covariance").double()
        return cls(mean, covariance, about["features"], about["data_sha256"])


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

    Classes with a single image have no pair; NaN where all are such.
    """
    classes, counts = labels.unique(return_counts=True)
    means = []
    for label in classes[counts > 1]:
        x, total = features[labels == label].double(), 0.0
        for start in range(0, len(x), ROWS):
            distances = torch.cdist(x[start : start + ROWS], x)
            distances.diagonal(start).zero_()  # rounding leaves an image a distance to itself
            total += float(distances.sum())
        means.append(total / (len(x) * (len(x) - 1)))
    return sum(means) / len(means) if means else math.nan


# KID, precision and recall, against a sample of the real images


@dataclass(frozen=True)
class RealSample:
    """Features of real images, with their neighbour distances and mean kernel."""

    features: Float[Tensor, "m f"]
    radius: Float[Tensor, " m"]  # see `neighbour_distances`
    kernel: Float[Tensor, ""]  # see `mean_kernel`

    @classmethod
    def of(cls, features: Float[Tensor, "n f"]) -> "RealSample":
        """Describe real images, of which there are at least `FEWEST`."""
        if len(features) < FEWEST:
            raise ValueError(
                f"{len(features)} real images: precision and recall need at least {FEWEST}; name more with --data"
            )
        return cls(features, neighbour_distances(features), mean_kernel(features))

    def save(self, file: Path) -> None:
        """Write a safetensors file."""
        write_tensors(file, dict(vars(self)), {})

    @classmethod
    def load(cls, file: Path) -> "RealSample":
        """Read what `save` wrote; what `safetensors` raises where there is no such file or a damaged one."""
        return cls(**load_file(file))


def sample_figures(drawn: Float[Tensor, "n f"], real: RealSample, device: torch.device | str) -> dict[str, float]:
    """Compute KID, precision and recall, in float64: on the device if that is CUDA, else on the CPU."""
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

    A ball reaches to an image's third nearest neighbour on its side (Kynkäänniemi et al. 2019): both sides have at
    least `FEWEST` images.
    """
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
