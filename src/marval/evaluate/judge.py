"""What drawn images are judged by: features of real images, a held-out classifier, ADM's reference."""

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from safetensors import SafetensorError, safe_open
from torch import Tensor

from marval.config import ModelConfig
from marval.data import FASHION_FORM, ImageData, check_classes, check_data, load_images
from marval.evaluate.features import (
    FASHION_STATISTICS,
    Features,
    Statistics,
    diversity_within_class,
    extract,
    find_features,
    frechet_distance,
)
from marval.evaluate.fidelity import SPLITS, Columns, Reference
from marval.evaluate.metrics import FEWEST, METRICS, MOST, RealSample, expected_bias, sample_figures
from marval.io.files import cache_folder, sha256_of, write_tensors
from marval.pipeline import Pipeline
from marval.rewards import Classifier, classifier_file, load_classifier
from marval.runtime.distributed import Workers
from marval.runtime.progress import progress

PART = 500  # images at a time


@dataclass(frozen=True)
class Judge:
    """Features, the real set's statistics, a classifier that no reward has seen; and what else may be asked for.

    Images are judged in two steps, so that many processes can share the first: `columns` of some images have a row for
    each; `figures_of` takes those of all.
    """

    network: Features
    real: Statistics | None
    classifier: Classifier | None
    sample: Callable[[], RealSample] | None = None  # for KID, precision and recall; called when these are measured
    reference: Reference | None = None
    classifier_sha256: str = ""

    @property
    def about(self) -> dict[str, str]:
        """What results say of it: the features' name and the SHA-256 of all that the figures depend on."""
        about = {"features": self.network.name, "data_sha256": "" if self.real is None else self.real.data_sha256}
        if self.classifier_sha256:
            about["classifier_sha256"] = self.classifier_sha256
        if self.reference is not None:
            about |= {"data_sha256": self.reference.sha256, "reference": self.reference.name}
            about["inception_sha256"] = self.reference.inception.sha256
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
        the features' ("efficientnet_kid": not KID), KID, precision and recall; held-out accuracy and log-probability;
        and against ADM's reference what `Reference.figures` finds.

        Raises:
            ValueError: a figure is not finite.
        """
        features, figures = columns["features"], dict[str, float]()
        if self.real is not None:
            figures["fd"] = frechet_distance(features, self.real)
        if self.sample is not None:
            device = next((p.device for p in self.network.parameters()), "cpu")
            near = sample_figures(features, self.sample(), device)
            figures |= {f"{self.network.prefix}_{name}": value for name, value in near.items()}
        figures["diversity"] = diversity_within_class(features, columns["labels"])
        figures |= {name: float(columns[name].mean()) for name in ("accuracy", "log_probability") if name in columns}
        if self.reference is not None:
            figures |= self.reference.figures(columns)
        for name, value in figures.items():
            if not (math.isfinite(value) or (name == "diversity" and math.isnan(value))):
                raise ValueError(f"{name} of {len(columns['labels'])} images is {value}: the features are not finite")
        return figures

    def check_count(self, count: int, option: str = "--samples") -> None:
        """Refuse a number of drawn images that some figure is not defined for."""
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
        blank = torch.zeros(2, space.channels, *space.image_size, dtype=torch.uint8)
        self.columns(blank, torch.zeros(2, dtype=torch.long))

    def warning(self, count: int) -> tuple[str, float] | None:
        """A warning and the Fréchet distance's (or FID's) expected bias where images are fewer than features."""
        real = self.reference.pool if self.reference is not None else self.real
        if real is None or count >= len(real.mean):
            return None
        bias = expected_bias(real, count)
        return (
            f"{count} images are fewer than {len(real.mean)} features: a perfect model would have a Fréchet "
            f"distance of about {bias:.4g}, not 0; compare equal counts only, or raise --samples",
            bias,
        )


def make_judge(
    pipeline: Pipeline,
    data: str | None = None,
    classifier: Path | None = None,
    workers: Workers | None = None,
    *,
    features: str | None = None,
    reference: Path | None = None,
    sample: int = 0,
    limit: int | None = None,
) -> Judge:
    """Make the judge of a model's images: a classifier, or the bundled one, and the real images' features.

    Args:
        data: the real images; the model's own when None.
        workers: where features and classifier compute; all but the main one only draw, and need no real images.
        features: "file.py:function" or "module:function" in the place of EfficientNet.
        reference: a file in the place of real images: ADM's `.npz`, or marval's statistics `.safetensors`.
        sample: real images that KID, precision and recall are measured on (at most `MOST`); 0: none is.
        limit: real images that are read at most, from all classes alike; all when None.

    Raises:
        ValueError: the data are latents, which have no pictures to compare with, they or the classifier do not fit the
            model, or the reference is missing, broken, or of other features.
    """
    workers, config = workers or Workers(), pipeline.config
    spec, space = data or config.data, config.space
    if classifier is None and spec.partition(":")[0] == "fashion-mnist":
        classifier = Path("fashion-judge")
    # A model of latents is trained on a cache, but its pictures are compared with pictures.
    check = check_data if config.space.kind == "pixels" else check_classes

    def real_images() -> ImageData:
        images = load_images(spec, size=space.image_size, channels=space.channels, limit=limit)
        check(images, config)
        return images

    if reference is None and spec.startswith("latents:"):
        raise ValueError(
            f"{spec} holds no pictures to compare with: name some, in training with --judge-data folder:DIR, in "
            "evaluation with --data folder:DIR"
        )
    judge = Judge(find_features(features).to(workers.device), None, None)
    if reference is not None and reference.suffix == ".safetensors":
        real = Statistics.load(reference, judge.network.name)
        judge = replace(judge, real=replace(real, data_sha256=real.data_sha256 or sha256_of(reference)))
    elif reference is not None:
        judge = replace(judge, reference=Reference.load(reference, workers.device))
    elif workers.main:
        if spec == "fashion-mnist":
            check(FASHION_FORM, config)  # the images themselves may never be read
        real, some = measure_data(judge.network, spec, real_images, sample)
        judge = replace(judge, real=real, sample=some)
    if classifier is not None:
        network = load_classifier(classifier).to(workers.device)
        check_classifier(network, config)
        judge = replace(judge, classifier=network, classifier_sha256=sha256_of(classifier_file(classifier)))
    return judge


def check_classifier(classifier: Classifier, config: ModelConfig) -> None:
    """Refuse a classifier of other classes or another number of channels."""
    channels = config.space.channels
    if (classifier.class_names, classifier.channels) != (config.class_names, channels):
        raise ValueError(
            f"--judge tells {', '.join(classifier.class_names[:4])}, ... apart in pictures of {classifier.channels} "
            f"channels, {config.name} draws {', '.join(config.class_names[:4])}, ... in {channels}: make another with "
            "marval train classifier"
        )


# Real images, whose features are computed once


def measure_data(
    network: Features, data: str, real_images: Callable[[], ImageData], sample: int = 0
) -> tuple[Statistics, Callable[[], RealSample] | None]:
    """A data set's statistics, bundled for Fashion-MNIST, and a function that gives those of a `sample` of it.

    Of "fashion-mnist" the real images are not read before something is measured that neither the package nor the cache
    holds of them.

    Raises:
        ValueError: bad images (when they are read), or Fashion-MNIST's are not those of the package.
    """
    bundled = Statistics.load(FASHION_STATISTICS)

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
        cache = cache_folder() / f"neighbours-{key}-{count}-{METRICS}.safetensors"
        features = real_sample(images, network, count, cache)
        images.cache_clear()  # their features are all that is needed from here on
        return features

    return real, some if count else None


def real_statistics(images: Callable[[], ImageData], network: Features, digest: str, cache: Path) -> Statistics:
    """Statistics of the real images, read from `cache` where they are there, else computed and kept there."""
    with contextlib.suppress(ValueError):  # none there, or a damaged one
        return Statistics.load(cache, network.name)
    Statistics.of(real_features(network, images().images), network.name, digest).save(cache)
    return Statistics.load(cache, network.name)  # kept in float32: so that the first run finds what later ones do


def real_sample(images: Callable[[], ImageData], network: Features, count: int, cache: Path) -> RealSample:
    """`count` real images, evenly spaced over the set, kept in `cache` likewise."""
    with contextlib.suppress(OSError, SafetensorError), safe_open(cache, framework="pt") as content:
        return RealSample(*(content.get_tensor(name) for name in ("features", "radius", "kernel")))
    data = images()
    count = min(count, len(data))
    some = data.images[torch.arange(count) * len(data) // count]
    sample = RealSample.of(torch.cat([*real_features(network, some)]))
    write_tensors(cache, dict(vars(sample)), {"features": network.name})
    return sample


def real_features(network: Features, images: UInt8[Tensor, "n c h w"]) -> Iterator[Float[Tensor, "_ f"]]:
    """Features of the real images, part by part."""
    with progress(len(images), "features of the real images") as advance:
        for part in images.split(PART):
            yield extract(network, part)
            advance(len(part))


def data_hash(data: ImageData) -> str:
    """SHA-256 of the images' bytes."""
    return hashlib.sha256(data.images.contiguous().numpy().data).hexdigest()
