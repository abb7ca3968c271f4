"""FID, Inception Score, sFID, precision and recall against ADM's reference file, with torch-fidelity's Inception.

torch-fidelity (the extra `fidelity`) needs torchvision, so it is no part of the default install. Its network is the
2015 Inception of the TensorFlow evaluators, which published FIDs were measured with.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from marval.evaluate.features import Statistics, frechet_distance
from marval.evaluate.metrics import neighbour_figures

POOL, LOGITS = "2048", "logits_unbiased"
SPATIAL = 7  # channels of the 17 x 17 map that sFID is measured on (Nash et al. 2021; ADM's evaluator)
SPLITS = 10  # of the Inception Score
BATCH = 50
ADM_FILE = "VIRTUAL_imagenet256_labeled.npz"
# ADM publishes none; this is what everybody who keeps the file records, with a size of 2,037,122,530 bytes.
ADM_SHA256 = "b32732719497e42660a9affb4a966068cba0855ac449b82015e34ec376d20758"
WHERE = (
    f"fetch {ADM_FILE} from https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/ "
    f"(ADM: FID, sFID, precision, recall; expected SHA-256 {ADM_SHA256}), or take fid_stats/adm_in256_stats.npz of "
    "LTH14/mar (FID only); the result records the SHA-256 of whichever you use"
)


@dataclass(frozen=True)
class Reference:
    """What ADM's file holds of ImageNet: Inception statistics, spatial ones and pictures, where it has them."""

    file: Path
    sha256: str
    pool: Statistics
    spatial: Statistics | None
    pictures: bool

    @classmethod
    def load(cls, file: Path) -> "Reference":
        """Read a reference file.

        Raises:
            ValueError: no such file (the message says where it comes from), one without `mu` and `sigma`, or one of
                ADM's name with another SHA-256.
        """
        if not file.is_file():
            raise ValueError(f"the reference {file} is not there: {WHERE}")
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while part := stream.read(1 << 24):
                digest.update(part)
        sha256 = digest.hexdigest()
        if file.name == ADM_FILE and sha256 != ADM_SHA256:
            raise ValueError(f"{file} has SHA-256 {sha256}, expected {ADM_SHA256}: fetch it again, or rename it")
        try:
            with np.load(file, allow_pickle=False) as content:
                names = set(content.files)
                if not {"mu", "sigma"} <= names:
                    raise ValueError(f"it holds {', '.join(sorted(names))}, expected mu and sigma")
                pool = _statistics(content["mu"], content["sigma"], "Inception, pooled")
                spatial = None
                if {"mu_s", "sigma_s"} <= names:
                    spatial = _statistics(content["mu_s"], content["sigma_s"], "Inception, spatial")
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{file} cannot be read as ADM's reference ({error}): {WHERE}") from None
        return cls(file, sha256, pool, spatial, "arr_0" in names)

    def figures(self, images: Iterable[UInt8[Tensor, "n c h w"]], device: torch.device) -> dict[str, float]:
        """FID, Inception Score (mean and standard deviation over 10 splits) and, where the file allows, sFID,
        precision and recall (k = 3, the first 10,000 of each side).

        Raises:
            ValueError: torch-fidelity is not installed, or the file's statistics are of another network.
        """
        inception = Inception(device)
        pool, logits, spatial = inception.of(images)
        if pool.shape[1] != len(self.pool.mean):
            raise ValueError(
                f"{self.file} has statistics of {len(self.pool.mean)} features, expected Inception's {pool.shape[1]}"
            )
        score = inception.score(logits)
        found = {"fid": frechet_distance(pool, self.pool), "inception_score": score[0], "inception_score_std": score[1]}
        if self.spatial is not None:
            found["sfid"] = frechet_distance(spatial, self.spatial)
        if self.pictures:
            with np.load(self.file, allow_pickle=False) as content:
                real = torch.from_numpy(content["arr_0"]).permute(0, 3, 1, 2)
            near = neighbour_figures(pool, inception.of([real])[0])
            found |= {"inception_precision": near["precision"], "inception_recall": near["recall"]}
        return found


class Inception:
    """torch-fidelity's Inception: pooled features, logits without bias, and ADM's spatial features."""

    def __init__(self, device: torch.device):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
            from torch_fidelity.metric_isc import isc_features_to_metric
        except ImportError as error:
            raise ValueError(
                "FID against a reference file needs torch-fidelity: pip install 'marval[fidelity]', with the "
                f"torchvision that belongs to your torch ({error})"
            ) from error
        self.device, self.isc = device, isc_features_to_metric
        self.network: Any = FeatureExtractorInceptionV3("inception-v3-compat", [POOL, LOGITS]).to(device).eval()
        self.spatial: Tensor | None = None
        # TensorFlow's mixed_6/conv, which ADM reads sFID from, is this branch.
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: Any, inputs: Any, output: Tensor) -> None:
        self.spatial = output[:, :SPATIAL].permute(0, 2, 3, 1).flatten(1)  # TensorFlow's channels come last

    @torch.inference_mode()
    def of(
        self, images: Iterable[UInt8[Tensor, "_ c h w"]]
    ) -> tuple[Float[Tensor, "n f"], Float[Tensor, "n l"], Float[Tensor, "n s"]]:
        """Pooled features, logits and spatial features of byte images, which may come in parts."""
        parts = []
        for batch in (batch for part in images for batch in part.split(BATCH)):
            pool, logits = self.network(batch.expand(-1, 3, -1, -1).contiguous().to(self.device))
            assert self.spatial is not None
            parts.append((pool.cpu(), logits.cpu(), self.spatial.float().cpu()))
        pools, all_logits, spatials = (torch.cat(kind) for kind in zip(*parts, strict=True))
        return pools, all_logits, spatials

    def score(self, logits: Float[Tensor, "n l"]) -> tuple[float, float]:
        """Inception Score: mean and standard deviation over the splits (Salimans et al. 2016)."""
        found = self.isc(logits, splits=SPLITS)
        return found["inception_score_mean"], found["inception_score_std"]


def _statistics(mean: Any, covariance: Any, features: str) -> Statistics:
    # The count of ADM's files is ImageNet's; the covariance is given, so any count leaves the distance as it is.
    return Statistics(torch.from_numpy(mean).double(), torch.from_numpy(covariance).double(), 1_281_167, features)
