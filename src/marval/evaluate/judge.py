"""What drawn images are judged by: features of real images, a held-out classifier, ADM's reference."""

import contextlib
import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from safetensors import SafetensorError, safe_open
from torch import Tensor

from marval.data import ImageData
from marval.evaluate.features import (
    Features,
    Statistics,
    bundled_statistics,
    diversity_within_class,
    extract,
    frechet_distance,
)
from marval.evaluate.fidelity import SPLITS, Columns, Reference
from marval.evaluate.metrics import FEWEST, METRICS, MOST, RealSample, compute_device, expected_bias, sample_figures
from marval.io.files import cache_folder, sha256_of, write_tensors
from marval.pipeline import Pipeline
from marval.rewards import Classifier, classifier_file, load_classifier
from marval.runtime.progress import progress

PART = 500  # images at a time
REAL_SAMPLE = tuple(field.name for field in dataclasses.fields(RealSample))


@dataclass(frozen=True)
class Judge:
    """Features, the real set's statistics, a classifier that no reward has seen; and what else may be asked for.

    Images are judged in two steps, so that many processes can share the first: `columns` of some images have a row for
    each; `figures_of` takes those of all.
    """

    network: Features
    real: Statistics | None
    classifier: Classifier | None
    sample: Callable[[], RealSample] | None = None  # for KID and neighbours; called when these are measured
    data_sha256: str = ""
    classifier_sha256: str = ""
    reference: Reference | None = None

    @property
    def prefix(self) -> str:
        """The prefix of the names of figures on its features."""
        return self.network.prefix

    @property
    def about(self) -> dict[str, str]:
        """What results say of it: the features' name and the SHA-256 of all that the figures depend on."""
        about = {"features": self.network.name, "data_sha256": self.data_sha256}
        if self.classifier_sha256:
            about["classifier_sha256"] = self.classifier_sha256
        if self.reference is not None:
            about |= {"reference": self.reference.name, "inception_sha256": self.reference.inception.sha256}
        return about

    def figures(self, images: UInt8[Tensor, "n c h w"], labels: Int[Tensor, " n"]) -> dict[str, float]:
        """Compute `figures_of` images in memory."""
        return self.figures_of(self.columns(images, labels))

    @torch.inference_mode()
    def columns(self, images: UInt8[Tensor, "n c h w"], labels: Int[Tensor, " n"]) -> Columns:
        """Compute what each image has by itself: label, features, and outputs of the classifier and of Inception."""
        columns = {"labels": labels, "features": extract(self.network, images)}
        if self.classifier is not None:
            device = next(self.classifier.parameters()).device
            logits = torch.cat([self.classifier(part.to(device).float() / 255).cpu() for part in images.split(PART)])
            known = logits.isfinite().all(dim=1)  # of numbers that are none, the first would be the largest
            columns["accuracy"] = torch.where(known, (logits.argmax(dim=1) == labels).float(), math.nan)
            columns["log_probability"] = logits.log_softmax(dim=1).gather(1, labels[:, None])[:, 0]
        if self.reference is not None:
            columns |= self.reference.inception.columns(images)
        return columns

    def figures_of(self, columns: Columns) -> dict[str, float]:
        """Every figure of images, from their `columns`.

        On the judge's features FD and diversity (NaN where no class has two images), and, under names that begin with
        the features' ("efficientnet_kid": not KID), KID, precision, recall, density and coverage; held-out accuracy
        and log-probability; and against ADM's reference what `Reference.figures` finds.

        Raises:
            ValueError: a figure is not finite.
        """
        features, figures = columns["features"], dict[str, float]()
        if self.real is not None:
            figures["fd"] = frechet_distance(features, self.real)
        if self.sample is not None:
            device = next((p.device for p in self.network.parameters()), torch.device("cpu"))
            near = sample_figures(features.to(compute_device(device)), self.sample())
            figures |= {f"{self.prefix}_{name}": value for name, value in near.items()}
        figures["diversity"] = diversity_within_class(features, columns["labels"])
        figures |= {name: float(columns[name].mean()) for name in ("accuracy", "log_probability") if name in columns}
        if self.reference is not None:
            figures |= self.reference.figures(columns)
        for name, value in figures.items():
            if not (math.isfinite(value) or (name == "diversity" and math.isnan(value))):
                raise ValueError(f"{name} of {len(columns['labels'])} images is {value}: the features are not finite")
        return figures

    def check_count(self, count: int, option: str = "--samples") -> None:
        """Refuse a number of drawn images that some figure is not defined for.

        Raises:
            ValueError: `count` is too small.
        """
        fewest = max(2, FEWEST if self.sample is not None else 0, SPLITS if self.reference is not None else 0)
        if count < fewest:
            raise ValueError(f"{option} {count}: expected at least {fewest} for the figures that are measured")

    def check_images(self, pipeline: Pipeline) -> None:
        """Judge two blank pictures of the model's form, so that a judge that cannot is found before anything is drawn.

        Raises:
            ValueError: the real images are missing or too few, or the judge's networks do not take the pictures.
        """
        if self.sample is not None:
            self.sample()
        space = pipeline.config.space
        blank = torch.zeros(2, getattr(space, "channels", 3), *space.image_size, dtype=torch.uint8)
        self.columns(blank, torch.zeros(2, dtype=torch.long))

    def warning(self, count: int) -> tuple[str, float] | None:
        """A warning and the Fréchet distance's expected bias where `count` images are fewer than features, else None.

        With ADM's reference it is that of the FID. Every verb that shows a distance says it once.
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


def real_features(network: Features, images: UInt8[Tensor, "n c h w"]) -> Iterator[Float[Tensor, "_ f"]]:
    """Features of the real images, part by part."""
    with progress(len(images), "features of the real images") as advance:
        for part in images.split(PART):
            yield extract(network, part)
            advance(len(part))


def real_statistics(images: Callable[[], ImageData], network: Features, digest: str, cache: Path) -> Statistics:
    """Statistics of the real images, read from `cache` where they are there, else computed and kept there."""
    with contextlib.suppress(ValueError):  # none there, or a damaged one
        return Statistics.load(cache, network.name)
    Statistics.of(real_features(network, images().images), network.name, digest).save(cache)
    return Statistics.load(cache, network.name)  # kept in float32: so that the first run finds what later ones do


def real_sample(images: Callable[[], ImageData], network: Features, count: int, cache: Path) -> RealSample:
    """`count` real images, evenly spaced over the set, kept in `cache` likewise."""
    with contextlib.suppress(OSError, SafetensorError), safe_open(cache, framework="pt") as content:
        return RealSample(**{name: content.get_tensor(name) for name in REAL_SAMPLE})
    data = images()
    count = min(count, len(data))
    some = data.images[torch.arange(count) * len(data) // count]
    sample = RealSample.of(torch.cat([*real_features(network, some)]))
    write_tensors(cache, {name: getattr(sample, name) for name in REAL_SAMPLE}, {"features": network.name})
    return sample


def data_hash(data: ImageData) -> str:
    """SHA-256 of the images' bytes."""
    return hashlib.sha256(data.images.contiguous().numpy().data).hexdigest()


def held_out(network: Features, classifier: Path | None = None, device: torch.device | str = "cpu") -> Judge:
    """Make a judge without real images: it can score single images, but compute no distance.

    Args:
        classifier: the held-out classifier, a file or a bundled one's name; none when None.
        device: where features and classifier compute.
    """
    network = network.to(device)
    if classifier is None:
        return Judge(network, None, None)
    digest = sha256_of(classifier_file(classifier))
    return Judge(network, None, load_classifier(classifier).to(device), classifier_sha256=digest)


def against_data(judge: Judge, data: str, real_images: Callable[[], ImageData], sample: int = 0) -> Judge:
    """Give a judge a data set's statistics: bundled for Fashion-MNIST; elsewhere they are computed once and cached.

    Of "fashion-mnist" the real images are not read before something is measured that neither the package nor the cache
    holds of them.

    Args:
        data: the data set's specification.
        real_images: loads the real images.
        sample: real images whose features KID and neighbours are measured on (at most `MOST`); 0: neither is.

    Raises:
        ValueError: bad images (when they are read), or Fashion-MNIST's are not those of the package.
    """
    network, bundled = judge.network, Statistics.load(bundled_statistics("fashion-mnist"))

    @functools.cache
    def images() -> ImageData:
        real = real_images()
        if data == "fashion-mnist" and data_hash(real) != bundled.data_sha256:
            raise ValueError(
                "Fashion-MNIST's images are not those of marval's statistics: name them by fashion-mnist:DIR"
            )
        return real

    digest = bundled.data_sha256 if data == "fashion-mnist" else data_hash(images())
    key = f"{digest[:16]}-{hashlib.sha256(network.name.encode()).hexdigest()[:8]}"
    real, count = bundled, min(sample, MOST)
    if (digest, network.name) != (bundled.data_sha256, bundled.features):
        real = real_statistics(images, network, digest, cache_folder() / f"statistics-{key}.safetensors")

    @functools.cache
    def some() -> RealSample:
        cache = cache_folder() / f"sample-{key}-{count}-{METRICS}.safetensors"
        features = real_sample(images, network, count, cache)
        images.cache_clear()  # their features are all that is needed from here on
        return features

    return dataclasses.replace(judge, real=real, sample=some if count else None, data_sha256=digest)


def against_reference(judge: Judge, file: Path, device: torch.device | str = "cpu") -> Judge:
    """Give a judge a reference file in the place of real images: ADM's `.npz`, or marval's statistics.

    Args:
        device: where ADM's network computes.

    Raises:
        ValueError: no such file (where ADM's comes from is said), statistics of other features (both are named), or
            what `Reference.load` raises.
    """
    if file.suffix == ".safetensors":
        real = Statistics.load(file, judge.network.name)
        return dataclasses.replace(judge, real=real, data_sha256=real.data_sha256 or sha256_of(file))
    reference = Reference.load(file, device)
    return dataclasses.replace(judge, reference=reference, data_sha256=reference.sha256)
