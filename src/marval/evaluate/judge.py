"""What drawn images are judged by: features of real images, a held-out classifier, ADM's reference; or rewards.

A judge works in two steps, so that many processes can share the first: `columns` of some images have a row for each;
`figures_of` takes those of all.
"""

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float, Int, UInt8
from safetensors import SafetensorError
from torch import Tensor

from marval.classes import seen_labels
from marval.config import ModelConfig
from marval.data import FASHION_FORM, ImageData, check_classes, check_data, load_images
from marval.evaluate.features import (
    FASHION_STATISTICS,
    METRICS,
    Features,
    RealSample,
    Statistics,
    diversity_within_class,
    extract,
    find_features,
    frechet_distance,
    sample_figures,
)
from marval.evaluate.fidelity import Columns, Reference
from marval.evaluate.results import Row, standard_error
from marval.io.files import cache_folder, sha256_of
from marval.pipeline import Pipeline
from marval.rewards import (
    Classifier,
    Prompt,
    Reward,
    checked,
    classifier_file,
    label_prompts,
    load_classifier,
    reward_hash,
)
from marval.runtime.distributed import Workers
from marval.runtime.progress import progress

PART = 500  # images at a time
REWARDED = 50  # images at a time, as rewards' networks are larger

Cached = TypeVar("Cached")


@dataclass(frozen=True)
class Judge:
    """Features, the real set's statistics, a classifier that no reward has seen; and what else may be asked for."""

    network: Features
    real: Statistics | None
    classifier: Classifier | None
    sample: RealSample | None = None  # for KID, precision and recall
    reference: Reference | None = None
    classifier_sha256: str = ""
    styles: int = 1  # of a model of text: the classifier tells its sentences apart, whose styles have labels in turn
    part = "quality"  # of the results

    @property
    def about(self) -> dict[str, str]:
        """What results say of it: the features' name and the SHA-256 of all that the figures depend on."""
        about = {"features": self.network.name, "data_sha256": "" if self.real is None else self.real.data_sha256}
        if self.classifier_sha256:
            about["classifier_sha256"] = self.classifier_sha256
        if self.reference is not None:
            about |= {"data_sha256": self.reference.sha256, "reference": self.reference.file.name}
            about["inception_sha256"] = self.reference.inception.sha256
        return about

    def measured(self, row: Row) -> bool:
        """Tell whether a row has all that this judge would measure."""
        return all(row.get(name) == value for name, value in self.about.items())

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
            classes = labels // self.styles
            columns["accuracy"] = (logits.argmax(dim=1) == classes).float()
            columns["log_probability"] = logits.log_softmax(dim=1).gather(1, classes[:, None])[:, 0]
        if self.reference is not None:
            columns |= self.reference.inception.columns(images)
        return columns

    def figures_of(self, columns: Columns) -> dict[str, float]:
        """Every figure of images, from their `columns`; diversity only where a class has two.

        KID, precision and recall have names that begin with the features' ("efficientnet_kid": not KID).
        """
        features, figures = columns["features"], dict[str, float]()
        if self.real is not None:
            figures["fd"] = frechet_distance(features, self.real)
        if self.sample is not None:
            device = next((p.device for p in self.network.parameters()), "cpu")
            near = sample_figures(features, self.sample, device)
            figures |= {f"{self.network.prefix}_{name}": value for name, value in near.items()}
        if (columns["labels"].bincount() > 1).any():
            figures["diversity"] = diversity_within_class(features, columns["labels"])
        figures |= {name: float(columns[name].mean()) for name in ("accuracy", "log_probability") if name in columns}
        if self.reference is not None:
            figures |= self.reference.figures(columns)
        for name, value in figures.items():
            if not math.isfinite(value):
                raise ValueError(f"{name} of {len(columns['labels'])} images is {value}: the features are not finite")
        return figures


@dataclass(frozen=True)
class RewardJudge:
    """Rewards over all labels' prompts: the paper's table of CLIP score and ImageReward, before and after tuning."""

    rewards: Mapping[str, Reward]
    prompt: str  # {} is the class's name; not of models of text
    config: ModelConfig  # of the models that draw
    device: torch.device
    part = "rewards"  # of the results

    @property
    def about(self) -> dict[str, str]:
        """What results say of it."""
        return {"prompt": "{}" if self.config.encoder else self.prompt}

    @functools.cached_property
    def asked(self) -> list[Prompt]:
        """The prompt of every label."""
        return label_prompts(self.prompt, self.config)

    @functools.cached_property
    def weights(self) -> dict[str, str]:
        """The SHA-256 of each reward's weights."""
        return {name: reward_hash(reward) for name, reward in self.rewards.items()}

    def measured(self, row: Row) -> bool:
        """Tell whether a row has all that this judge would measure."""
        weights = {name: score.get("sha256") for name, score in row["rewards"].items()}
        return row.get("prompt") == self.about["prompt"] and self.weights.items() <= weights.items()

    @torch.no_grad()
    def columns(self, images: UInt8[Tensor, "n c h w"], labels: Int[Tensor, " n"]) -> Columns:
        """Compute every reward of every image with its class's prompt."""
        prompts = [self.asked[label] for label in labels.tolist()]
        columns: Columns = {}
        for name, reward in self.rewards.items():
            parts = [
                checked(name, reward, part.to(self.device).float() / 255, prompts[i * REWARDED :][: len(part)])
                for i, part in enumerate(images.split(REWARDED))
            ]
            columns[name] = torch.cat(parts).cpu()
        return columns

    def figures_of(self, columns: Columns) -> Row:
        """The mean of each reward and its standard error over the images, and the number of prompts."""
        scores: Row = {}
        for name, values in columns.items():
            mean, error = (float(f"{value:.6g}") for value in standard_error(values.double().tolist()))
            scores[name] = {"mean": mean, "standard_error": error, "sha256": self.weights[name]}
        return {"rewards": scores, "prompts": min(len(values), len(seen_labels(self.config)))}


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
        reference: ADM's `.npz` in the place of real images.
        sample: real images that KID, precision and recall are measured on; 0: none is.
        limit: real images that are read at most, from all classes alike; all when None.

    Raises:
        ValueError: the data are latents, which have no pictures to compare with, they or the classifier do not fit the
            model, or the reference is missing or broken.
    """
    workers, config = workers or Workers(), pipeline.config
    spec, space = data or config.data, config.space
    real_images = None if reference is not None else real_reader(spec, config, limit)
    judge = Judge(find_features(features).to(workers.device), None, None, styles=config.mar.labels_per_class)
    if classifier is None and spec.partition(":")[0] == "fashion-mnist":
        classifier = Path("fashion-judge")
    if classifier is not None:
        network, channels = load_classifier(classifier).to(workers.device), space.channels
        if (network.class_names, network.channels) != (config.class_names, channels):
            raise ValueError(
                f"--judge tells {', '.join(network.class_names[:4])}, ... apart in {network.channels} channels, "
                f"{config.name} draws {', '.join(config.class_names[:4])}, ... in {channels}: make another with marval "
                "train classifier"
            )
        judge = replace(judge, classifier=network, classifier_sha256=sha256_of(classifier_file(classifier)))
    if reference is not None:
        judge = replace(judge, reference=Reference.load(reference, workers.device))
    elif workers.main and real_images is not None:
        real, some = measure_data(judge.network, spec, real_images, sample)
        judge = replace(judge, real=real, sample=some)
    return judge


# Real images, whose features are computed once


def real_reader(spec: str, config: ModelConfig, limit: int | None = None) -> Callable[[], ImageData]:
    """What reads the real images that a model's are compared with, when features of theirs are not known yet.

    Args:
        limit: see `make_judge`.

    Raises:
        ValueError: the data are latents, or other images than the model's.
    """
    if spec.startswith("latents:"):
        raise ValueError(
            f"{spec} holds no pictures to compare with: name some, in training with --judge-data folder:DIR, in "
            "evaluation with --data folder:DIR"
        )
    space = config.space
    # A model of latents is trained on a cache, but its pictures are compared with pictures.
    check = check_data if space.kind == "pixels" else check_classes
    if spec == "fashion-mnist":
        check(FASHION_FORM, config)  # the images themselves may never be read

    def read_images() -> ImageData:
        images = load_images(spec, size=space.image_size, channels=space.channels, limit=limit, encoder=config.encoder)
        check(images, config)
        return images

    return read_images


def measure_data(
    network: Features, data: str, real_images: Callable[[], ImageData], sample: int = 0
) -> tuple[Statistics, RealSample | None]:
    """A data set's statistics and a `sample` of it; the images are read only where package and cache lack something."""
    real, images = Statistics.load(FASHION_STATISTICS), functools.cache(real_images)
    digest = real.data_sha256 if data == "fashion-mnist" else data_hash(images())
    key = f"{digest[:16]}-{hashlib.sha256(network.name.encode()).hexdigest()[:8]}"

    def measure(file: Path) -> None:
        Statistics.of(real_features(network, images().images), network.name, digest).save(file)

    def measure_some(file: Path) -> None:
        total, count = len(images()), min(sample, len(images()))
        some = images().images[torch.arange(count) * total // count]  # evenly spaced over the set
        RealSample.of(torch.cat([*real_features(network, some)])).save(file)

    if (digest, network.name) != (real.data_sha256, real.features):
        real = cached(f"statistics-{key}.safetensors", Statistics.load, measure)
    neighbours = f"neighbours-{key}-{sample}-{METRICS}.safetensors"
    return real, cached(neighbours, RealSample.load, measure_some) if sample else None


def cached(name: str, load: Callable[[Path], Cached], make: Callable[[Path], None]) -> Cached:
    """Load a file of the cache; where it is missing or damaged, make it first."""
    file = cache_folder() / name
    with contextlib.suppress(OSError, SafetensorError):
        return load(file)
    make(file)
    return load(file)


def real_features(network: Features, images: UInt8[Tensor, "n c h w"]) -> Iterator[Float[Tensor, "_ f"]]:
    """Features of the real images, part by part."""
    with progress(len(images), "features of the real images") as advance:
        for part in images.split(PART):
            yield extract(network, part)
            advance(len(part))


def data_hash(data: ImageData) -> str:
    """SHA-256 of the images' bytes."""
    return hashlib.sha256(data.images.contiguous().numpy().data).hexdigest()
