"""What drawn images are judged by: features of real images, a held-out classifier, ADM's reference."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from safetensors import safe_open
from torch import Tensor, nn

from marval.data import ImageData
from marval.evaluate.features import (
    Features,
    Statistics,
    bundled_statistics,
    diversity_within_class,
    extract,
    find_features,
    frechet_distance,
)
from marval.evaluate.fidelity import Reference
from marval.evaluate.metrics import (
    MOST,
    NEIGHBOURS,
    expected_bias,
    kernel_distance,
    neighbour_distances,
    neighbour_figures,
)
from marval.io.files import write_tensors
from marval.rewards import Classifier, load_classifier

Parts = Iterable[tuple[UInt8[Tensor, "_ c h w"], Int[Tensor, " _"]]]


@dataclass(frozen=True)
class RealSample:
    """Features of some real images, and each one's distances to its neighbours among them."""

    features: Float[Tensor, "m f"]
    radius: Float[Tensor, "2 m"]


@dataclass(frozen=True)
class Judge:
    """Features, the real set's statistics, a classifier that no reward has seen; and what else may be asked for."""

    network: nn.Module
    real: Statistics | None
    classifier: Classifier | None
    sample: Callable[[], RealSample] | None = None  # for KID and neighbours; called when these are measured
    data_sha256: str = ""
    reference: Reference | None = None

    def figures(self, images: UInt8[Tensor, "n c h w"], labels: Int[Tensor, " n"]) -> dict[str, float]:
        """As `figures_of`, of images in memory."""
        return self.figures_of([(images, labels)])

    def figures_of(self, parts: Parts) -> dict[str, float]:
        """Every figure of images that come in parts, read once or (with a reference) twice.

        FD, KID, precision, recall, density, coverage and diversity on the judge's features; held-out accuracy and
        log-probability; and against ADM's reference what `Reference.figures` finds.
        """
        features, labels, columns = [], [], []
        for images, part_labels in parts:
            features.append(extract(self.network, images))
            labels.append(part_labels)
            columns.append(self._scores(images, part_labels))
        found = self._distances(torch.cat(features))
        found["diversity"] = diversity_within_class(torch.cat(features), torch.cat(labels))
        for name in columns[0]:
            found[name] = float(torch.cat([column[name] for column in columns]).mean())
        if self.reference is not None:
            device = next(iter(self.network.parameters()), torch.empty(0)).device
            found |= self.reference.figures((images for images, _ in parts), device)
        return found

    def _distances(self, features: Float[Tensor, "n f"]) -> dict[str, float]:
        found = {}
        if self.real is not None:
            found["fd"] = frechet_distance(features, self.real)
        if self.sample is not None:
            some = self.sample()
            found["kid"] = kernel_distance(features, some.features)
            if min(len(features), len(some.features)) > max(NEIGHBOURS):
                found |= neighbour_figures(features, some.features, some.radius)
        return found

    @torch.inference_mode()
    def _scores(self, images: UInt8[Tensor, "n c h w"], labels: Int[Tensor, " n"]) -> dict[str, Tensor]:
        """The numbers that each image has by itself."""
        found: dict[str, list[Tensor]] = {}
        for part, wanted in zip(images.split(500), labels.split(500), strict=True):
            if self.classifier is not None:
                device = next(self.classifier.parameters()).device
                logits = self.classifier(part.to(device).float() / 255).cpu()
                found.setdefault("accuracy", []).append((logits.argmax(dim=1) == wanted).float())
                chosen = logits.log_softmax(dim=1).gather(1, wanted[:, None])[:, 0]
                found.setdefault("log_probability", []).append(chosen)
        return {name: torch.cat(values) for name, values in found.items()}

    def warning(self, count: int) -> tuple[str, float] | None:
        """What to say, and the bias of the Fréchet distance to expect, where `count` images are fewer than features.

        Of ADM's reference it is that of the FID.
        """
        real = self.reference.pool if self.real is None and self.reference is not None else self.real
        if real is None or count >= len(real.mean):
            return None
        bias = expected_bias(real, count)
        return (
            f"{count} images are fewer than {len(real.mean)} features: a perfect model would have a Fréchet "
            f"distance of about {bias:.4g}, not 0; compare equal counts only, or raise --samples",
            bias,
        )


def cache_folder() -> Path:
    """Where statistics and features of real images are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "marval"


def real_statistics(images: Callable[[], ImageData], network: Features, digest: str, cache: Path) -> Statistics:
    """Statistics of the real images, read from `cache` where they are there, else computed and kept there."""
    if cache.is_file():
        return Statistics.load(cache, network.name)
    parts = (extract(network, part) for part in images().images.split(1000))
    found = Statistics.of(parts, network.name, digest)
    found.save(cache)
    return found


def real_sample(images: Callable[[], ImageData], network: Features, count: int, cache: Path) -> RealSample:
    """`count` real images, evenly spaced over the set, kept in `cache` likewise."""
    if cache.is_file():
        with safe_open(cache, framework="pt") as content:
            return RealSample(content.get_tensor("features"), content.get_tensor("radius"))
    data = images()
    count = min(count, len(data))
    chosen = torch.arange(count) * len(data) // count
    features = extract(network, data.images[chosen])
    found = RealSample(features, neighbour_distances(features))
    write_tensors(cache, {"features": found.features, "radius": found.radius}, {"features": network.name})
    return found


def data_hash(data: ImageData) -> str:
    """SHA-256 of the images' bytes."""
    return hashlib.sha256(data.images.contiguous().numpy().tobytes()).hexdigest()


def load_judge(
    data: str,
    classifier: Path | None,
    real_images: Callable[[], ImageData],
    *,
    features: str | None = None,
    sample: int = 0,
    device: torch.device | str = "cpu",
) -> Judge:
    """The judge for a data set: bundled for Fashion-MNIST; elsewhere statistics are computed once and cached.

    Of "fashion-mnist" the real images are not read before something is measured that neither the package nor the cache
    holds of them.

    Args:
        data: the data set's specification.
        classifier: the held-out classifier; the bundled one for Fashion-MNIST when None, else none.
        real_images: loads the real images.
        features: see `find_features`.
        sample: real images whose features KID and neighbours are measured on (at most `MOST`); 0: neither is.
        device: where features and classifier compute.

    Raises:
        ValueError: bad features or images (when they are read), or Fashion-MNIST's are not those of the package.
    """
    fashion = data.partition(":")[0] == "fashion-mnist"
    network = find_features(features).to(device)
    bundled = Statistics.load(bundled_statistics("fashion-mnist"))

    @functools.cache
    def images() -> ImageData:
        found = real_images()
        if data == "fashion-mnist" and data_hash(found) != bundled.data_sha256:
            raise ValueError(
                "Fashion-MNIST's images are not those of marval's statistics: name them by fashion-mnist:DIR"
            )
        return found

    digest = bundled.data_sha256 if data == "fashion-mnist" else data_hash(images())
    key = f"{digest[:16]}-{hashlib.sha256(network.name.encode()).hexdigest()[:8]}"
    if digest == bundled.data_sha256 and network.name == bundled.features:
        real = bundled
    else:
        real = real_statistics(images, network, digest, cache_folder() / f"statistics-{key}.safetensors")
    count = min(sample, MOST)
    cache = cache_folder() / f"features-{key}-{count}.safetensors"

    @functools.cache
    def some() -> RealSample:
        found = real_sample(images, network, count, cache)
        images.cache_clear()  # their features are all that is needed from here on
        return found

    if classifier is None and fashion:
        classifier = Path("fashion-judge")
    held_out = None if classifier is None else load_classifier(classifier).to(device)
    return Judge(network, real, held_out, some if count else None, digest)


def judge_by_reference(file: Path, classifier: Path | None, features: str | None, device: torch.device | str) -> Judge:
    """A judge with a reference file in the place of real images: ADM's `.npz`, or marval's statistics.

    Raises:
        ValueError: no such file (where ADM's comes from is said), or statistics of other features (both are named).
    """
    network = find_features(features).to(device)
    held_out = None if classifier is None else load_classifier(classifier).to(device)
    judge = Judge(network, None, held_out)
    if file.suffix == ".safetensors":
        real = Statistics.load(file, network.name)
        digest = real.data_sha256 or hashlib.sha256(file.read_bytes()).hexdigest()
        return dataclasses.replace(judge, real=real, data_sha256=digest)
    reference = Reference.load(file)
    return dataclasses.replace(judge, reference=reference, data_sha256=reference.sha256)
