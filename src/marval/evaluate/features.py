"""Image features of EfficientNet-Lite0 (ImageNet weights, packaged, offline) and statistics of them.

A Fréchet distance on these features is called FD-EfficientNet: it is not FID, and compares with nothing else.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from marval.efficientnet import FEATURES
from marval.io.files import write_tensors


@torch.inference_mode()
def extract(network: nn.Module, images: UInt8[Tensor, "n c h w"], batch_size: int = 100) -> Float[Tensor, "n f"]:
    """Features of many images, batch by batch."""
    device = next(network.parameters()).device
    return torch.cat([network(part.to(device)).cpu() for part in images.split(batch_size)])


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features, and of how many images."""

    mean: Float[Tensor, " f"]
    covariance: Float[Tensor, "f f"]
    count: int

    @classmethod
    def of(cls, parts: Iterable[Float[Tensor, "_ f"]]) -> "Statistics":
        """The statistics of features that come in parts, summed in float64."""
        count, total, outer = 0, torch.tensor(0.0), torch.tensor(0.0)
        for part in parts:
            part = part.double()
            count, total, outer = count + len(part), total + part.sum(dim=0), outer + part.T @ part
        mean = total / count
        return cls(mean, (outer - count * mean[:, None] * mean) / (count - 1), count)

    def save(self, file: Path) -> None:
        """Write mean and upper triangle in float32."""
        rows, columns = torch.triu_indices(*self.covariance.shape).unbind()
        tensors = {"mean": self.mean.float(), "covariance": self.covariance[rows, columns].float()}
        write_tensors(file, tensors, {"features": FEATURES, "count": str(self.count)})

    @classmethod
    def load(cls, file: Path) -> "Statistics":
        """Read what `save` wrote.

        Raises:
            ValueError: no such file, a damaged one, or statistics of other features.
        """
        try:
            with safe_open(file, framework="pt") as content:
                about = content.metadata() or {}
                if about.get("features") != FEATURES:
                    raise ValueError(f"{file} has features {about.get('features')!r}, expected {FEATURES!r}")
                mean, triangle = content.get_tensor("mean").double(), content.get_tensor("covariance").double()
        except (FileNotFoundError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read as feature statistics ({error})") from None
        rows, columns = torch.triu_indices(len(mean), len(mean)).unbind()
        covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
        covariance[rows, columns] = triangle
        covariance[columns, rows] = triangle
        return cls(mean, covariance, int(about["count"]))


def frechet_distance(features: Float[Tensor, "n f"], real: Statistics) -> float:
    """Fréchet distance between Gaussians fitted to `features` and to the real images (Heusel et al. 2017)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Given(nn.Module):  # torchmetrics asks a network for features: these are ready
        num_features = features.shape[1]

        def forward(self, x: Tensor) -> Tensor:
            return x

    metric = FrechetInceptionDistance(feature=Given())
    metric.set_dtype(torch.float64)
    metric.update(features.double(), real=False)
    n, mean = real.count, real.mean
    metric.real_features_num_samples = torch.tensor(n)
    metric.real_features_sum = n * mean
    metric.real_features_cov_sum = (n - 1) * real.covariance + n * mean[:, None] * mean
    return float(metric.compute())


def bundled_statistics(name: str) -> Path:
    """Where the statistics of a bundled data set lie."""
    return Path(str(files("marval"))) / "assets" / f"{name}-statistics.safetensors"


def diversity_within_class(features: Float[Tensor, "n f"], labels: Tensor, most: int = 200) -> float:
    """Mean Euclidean distance between features of two images of a class, averaged over classes (`most` of each)."""
    distances = [torch.pdist(features[labels == label][:most].float()).mean() for label in labels.unique()]
    return float(torch.stack(distances).mean())
