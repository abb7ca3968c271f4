"""The models and the judge that a command names."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

from marval.config import Chain, OneStep, Order, PixelSpace
from marval.data import FASHION_FORM, ImageData, check_classes, check_data, load_images
from marval.evaluate.features import find_features
from marval.evaluate.judge import Judge, against_data, against_reference, held_out
from marval.evaluate.results import model_hashes
from marval.pipeline import Pipeline, find_model, load
from marval.runtime.distributed import Workers
from marval.runtime.provenance import commit

JUDGED = 10_000  # real images that a training run's judge reads at most


def load_models(
    names: Sequence[str],
    device: str,
    *,
    diffusion_steps: Sequence[int] = (),
    guidance: Sequence[float] = (),
    temperature: float | None = None,
    order: Order | None = None,
) -> list[tuple[Path, Pipeline]]:
    """Load models with their folders, each once; a teacher once for each T (the largest first) and w.

    Raises:
        ValueError: no model is named, one cannot be loaded, two share a name, or a teacher's settings are given
            without a teacher.
    """
    if not names:
        raise ValueError("name at least one model, for example fashion-student")
    steps, scales = sorted(diffusion_steps, reverse=True) or (None,), guidance or (None,)
    pipelines = [load(name, device) for name in names]
    teachers = any(isinstance(pipeline.config.draw, Chain) for pipeline in pipelines)
    loaded: list[tuple[Path, Pipeline]] = []
    for name, pipeline in zip(names, pipelines, strict=True):
        if order is not None:
            config = dataclasses.replace(pipeline.config, order=order)
            pipeline = Pipeline(pipeline.model, config, pipeline.space)
        if teachers and isinstance(pipeline.config.draw, OneStep):
            loaded.append((find_model(name), pipeline))
            continue
        for t, w in itertools.product(steps, scales):  # a student among students refuses what it has not
            chain = pipeline.with_chain(diffusion_steps=t, guidance=w, temperature=temperature)
            loaded.append((find_model(name), chain))
    commit()  # as the code is now: the command may run for hours
    keys = [(digest, p.config.name, p.config.draw) for digest, (_, p) in zip(model_hashes(loaded), loaded, strict=True)]
    return list(dict(zip(keys, loaded, strict=True)).values())


def judge_for(
    pipeline: Pipeline,
    data: str | None,
    classifier: Path | None,
    workers: Workers | None = None,
    *,
    features: str | None = None,
    reference: Path | None = None,
    sample: int = 0,
    limit: int | None = None,
) -> Judge:
    """Make the judge of a model's images: a classifier, or the bundled one, and the real images' features.

    Args:
        workers: where features and classifier compute; all but the main one only draw, and need no real images.
        features: "file.py:function" or "module:function" in the place of EfficientNet.
        reference: a file in the place of real images: ADM's `.npz`, or marval's statistics `.safetensors`.
        sample: real images that KID and neighbours are measured on.
        limit: real images that are read at most, from all classes alike; all when None.

    Raises:
        ValueError: the data are latents, which have no pictures to compare with, or they or the classifier do not fit
            the model.
    """
    workers = workers or Workers()
    spec = data or pipeline.config.data
    if classifier is None and spec.partition(":")[0] == "fashion-mnist":
        classifier = Path("fashion-judge")
    # A model of latents is trained on a cache, but its pictures are compared with pictures.
    check = check_data if pipeline.config.space.kind == "pixels" else check_classes

    def real_images() -> ImageData:
        channels = getattr(pipeline.config.space, "channels", 3)
        images = load_images(spec, size=pipeline.config.space.image_size, channels=channels, limit=limit)
        check(images, pipeline.config)
        return images

    if reference is None and spec.startswith("latents:"):
        raise ValueError(
            f"{spec} holds no pictures to compare with: name some, in training with --judge-data folder:DIR, in "
            "evaluation with --data folder:DIR"
        )
    judge = held_out(find_features(features), classifier, workers.device)
    if reference is not None:
        judge = against_reference(judge, reference, workers.device)
    elif workers.main:
        if spec == "fashion-mnist":
            check(FASHION_FORM, pipeline.config)  # the images themselves may never be read
        judge = against_data(judge, spec, real_images, sample)
    check_classifier(judge, pipeline)
    return judge


def training_judge(pipeline: Pipeline, data: str | None, classifier: Path | None, workers: Workers) -> Judge:
    """Make the judge of a training run's probes, with a sample of the real images.

    Raises:
        ValueError: as `judge_for`.
    """
    return judge_for(pipeline, data, classifier, workers, limit=JUDGED)


def check_classifier(judge: Judge, pipeline: Pipeline) -> None:
    """Check that a judge's classifier has the model's classes and channels.

    Raises:
        ValueError: other classes, or another number of channels.
    """
    config, classifier = pipeline.config, judge.classifier
    channels = config.space.channels if isinstance(config.space, PixelSpace) else 3
    if classifier is not None and (classifier.class_names, classifier.channels) != (config.class_names, channels):
        raise ValueError(
            f"--judge tells {', '.join(classifier.class_names[:4])}, ... apart in pictures of {classifier.channels} "
            f"channels, {config.name} draws {', '.join(config.class_names[:4])}, ... in {channels}: make another with "
            "marval train classifier"
        )
