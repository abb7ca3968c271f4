"""FID, Inception Score, sFID, KID, precision and recall against ADM's reference file, with torch-fidelity's Inception.

torch-fidelity (the extra `fidelity`) needs torchvision, so it is no part of the default install. Its network is the
2015 Inception of the TensorFlow evaluators, which published FIDs were measured with.

Not checked: the published weights have never been loaded here. The tests run a stand-in with the same interface, so
FID, IS and sFID have not been compared with a published value.
"""

import functools
import urllib.error
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from marval.evaluate.features import MOST, RealSample, Statistics, frechet_distance, sample_figures
from marval.io.files import sha256_of

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


Columns = dict[str, Tensor]  # a row for each image


@dataclass(frozen=True)
class Reference:
    """ADM's file on ImageNet (Inception statistics; where it has them spatial ones and pictures), and the network."""

    file: Path
    sha256: str
    pool: Statistics
    spatial: Statistics | None
    pictures: bool
    inception: "Inception"

    @classmethod
    def load(cls, file: Path, device: torch.device | str) -> "Reference":
        """Read a reference file and the network; an error says where to get what is missing or broken."""
        if not file.is_file():
            raise ValueError(f"the reference {file} is not there: {WHERE}")
        sha256 = sha256_of(file)
        if file.name == ADM_FILE and sha256 != ADM_SHA256:
            raise ValueError(f"{file} has SHA-256 {sha256}, expected {ADM_SHA256}: fetch it again, or rename it")
        inception, found = Inception(device), dict[str, Statistics]()
        blank = inception.columns(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
        try:
            with np.load(file, allow_pickle=False) as content:
                for name, mean, covariance in (("pool", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
                    if name == "pool" or mean in content:
                        mu, sigma = (torch.from_numpy(content[key]).double() for key in (mean, covariance))
                        found[name] = Statistics(mu, sigma, f"Inception, {name}")
                        if mu.shape != blank[name][0].shape:
                            raise ValueError(f"{mean} has shape {tuple(mu.shape)}, not the network's")
                pictures = "arr_0" in content
        except (OSError, ValueError, TypeError, LookupError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{file} cannot be read as ADM's reference ({error}): {WHERE}") from None
        return cls(file, sha256, found["pool"], found.get("spatial"), pictures, inception)

    @functools.cached_property
    def sample(self) -> RealSample:
        """What the network sees in the file's pictures (the first `MOST`); computed at the first call."""
        with np.load(self.file, allow_pickle=False) as content:
            pictures = torch.from_numpy(content["arr_0"][:MOST]).permute(0, 3, 1, 2)
        return RealSample.of(self.inception.columns(pictures)["pool"])

    def figures(self, columns: Columns) -> dict[str, float]:
        """FID, Inception Score over 10 splits and, where the file allows, sFID, KID, precision and recall.

        Args:
            columns: `Inception.columns` of the drawn images.
        """
        pool = columns["pool"]
        score = self.inception.isc(columns["logits"], splits=SPLITS)  # Salimans et al. 2016
        figures = {"fid": frechet_distance(pool, self.pool), "inception_score": score["inception_score_mean"]}
        figures["inception_score_std"] = score["inception_score_std"]
        if self.spatial is not None:
            figures["sfid"] = frechet_distance(columns["spatial"], self.spatial)
        if self.pictures:
            near = sample_figures(pool, self.sample, self.inception.device)
            figures |= {f"inception_{name}": value for name, value in near.items()}
        return figures


class Inception:
    """torch-fidelity's Inception: pooled features, logits without bias, and ADM's spatial features."""

    def __init__(self, device: torch.device | str):
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as fidelity
            from torch_fidelity.metric_isc import isc_features_to_metric
        except ImportError as error:
            raise ValueError(
                "FID against a reference file needs torch-fidelity: pip install torch-fidelity, with the "
                f"torchvision that belongs to your torch ({error})"
            ) from error
        weights = Path(torch.hub.get_dir()) / "checkpoints" / Path(fidelity.URL_INCEPTION_V3).name
        try:
            network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", [POOL, LOGITS])
        except (urllib.error.URLError, OSError) as error:
            raise ValueError(
                f"torch-fidelity's Inception cannot be fetched ({error}): put {fidelity.URL_INCEPTION_V3} at {weights}"
            ) from None
        self.device, self.isc = torch.device(device), isc_features_to_metric
        self.network: Any = network.to(device).eval()
        self.sha256 = sha256_of(weights)
        self.spatial: Tensor | None = None
        # TensorFlow's mixed_6/conv, which ADM reads sFID from, is this branch.
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: Any, inputs: Any, output: Tensor) -> None:
        self.spatial = output[:, :SPATIAL].permute(0, 2, 3, 1).flatten(1)  # TensorFlow's channels come last

    @torch.inference_mode()
    def columns(self, images: UInt8[Tensor, "n c h w"]) -> Columns:
        """Pooled features (n, 2048), logits (n, 1008) and spatial features (n, 2023) of byte images, on the CPU."""
        parts: list[Columns] = []
        for batch in images.split(BATCH):
            pool, logits = self.network(batch.expand(-1, 3, -1, -1).contiguous().to(self.device))
            assert self.spatial is not None
            parts.append({"pool": pool.cpu(), "logits": logits.cpu(), "spatial": self.spatial.float().cpu()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
