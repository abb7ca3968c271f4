"""What the verbs' arguments stand for: the device, models, data and judges that they name."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from marval.config import Chain
from marval.presets import DistillConfig, TuneConfig

if TYPE_CHECKING:
    import torch

    from marval.data import ImageData, TrainingData
    from marval.evaluate.judge import Judge
    from marval.pipeline import Pipeline
    from marval.runtime.distributed import Workers
    from marval.train.anchor import Anchor

JUDGED = 10_000  # real images that a training run's judge reads at most


TESTED = ("cpu", "cuda")  # kinds of devices that the tests have run on


def usable_device(name: str) -> str:
    """`name`, or for "auto" the accelerator of this machine (of a kind that was tested), else "cpu".

    A device of another kind may be named; a warning says that nobody has checked what it draws.

    Raises:
        ValueError: no such device here.
    """
    import torch

    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found.type if found is not None and found.type in TESTED else "cpu"
    try:
        kind = torch.device(name).type
        if kind == "meta":
            raise ValueError("it holds no numbers")
        torch.zeros(1, device=name).cpu()
    except Exception as error:  # torch raises many kinds, from its back ends too
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"--device {name}: not here ({reason}); expected auto, cpu or cuda") from None
    if kind not in TESTED:
        print(
            f"warning: marval was never tested on {kind}: compare some pictures with --device cpu first",
            file=sys.stderr,
        )
    return name


def load_pipeline(name: str, device: str) -> "Pipeline":
    """A bundled model by name, or a model's or run's folder."""
    from marval.pipeline import load

    return load(name, usable_device(device))


def data_of(pipeline: "Pipeline", data: str | None) -> "TrainingData":
    """The images that `--data` names, or those that the model was trained on; checked against the model."""
    from marval.data import check_data, load_data

    channels = getattr(pipeline.config.space, "channels", None)
    images = load_data(data or pipeline.config.data, size=pipeline.config.space.image_size, channels=channels)
    check_data(images, pipeline.config)
    return images


def load_models(
    names: Sequence[str], device: str, diffusion_steps: Sequence[int] = (), guidance: Sequence[float] = ()
) -> list[tuple[Path, "Pipeline"]]:
    """Models with their folders, each once; a teacher once for each T (the largest first) and w.

    Raises:
        ValueError: no model is named, one cannot be loaded, two share a name, or T or w are given without a teacher.
    """
    from marval.evaluate.results import model_hashes
    from marval.pipeline import find_model, load
    from marval.runtime.provenance import commit

    if not names:
        raise ValueError("name at least one model, for example fashion-student")
    found: list[tuple[Path, Pipeline]] = []
    for name in names:
        pipeline = load(name, device)
        if isinstance(pipeline.config.draw, Chain):
            pairs = [(t, w) for t in sorted(diffusion_steps, reverse=True) or (None,) for w in guidance or (None,)]
            found += [(find_model(name), pipeline.with_chain(diffusion_steps=t, guidance=w)) for t, w in pairs]
        else:
            found.append((find_model(name), pipeline))
    if (diffusion_steps or guidance) and not any(isinstance(p.config.draw, Chain) for _, p in found):
        found[0][1].with_chain(
            diffusion_steps=next(iter(diffusion_steps), None), guidance=next(iter(guidance), None)
        )  # says why not
    commit()  # as the code is now: the command may run for hours
    hashes = model_hashes(found)
    once = {
        (digest, p.config.name, p.config.draw): (folder, p) for digest, (folder, p) in zip(hashes, found, strict=True)
    }
    return list(once.values())


def judge_for(
    pipeline: "Pipeline",
    data: str | None,
    classifier: Path | None,
    *,
    features: str | None = None,
    sample: int = 0,
    reference: Path | None = None,
    main: bool = True,
    limit: int | None = None,
    option: str = "--data",
    device: "torch.device | str | None" = None,
) -> "Judge":
    """What the model's images are judged by: `--judge` or the bundled classifier, and the real images' features.

    Args:
        features: "file.py:function" or "module:function" in the place of EfficientNet.
        sample: real images that KID and neighbours are measured on.
        reference: a file in the place of real images: ADM's `.npz`, or marval's statistics `.safetensors`.
        main: False: of several processes one that only draws and judges single images, and needs no real ones.
        limit: real images that are read at most, from all classes alike; all when None.
        option: what names the real images, for messages.
        device: where features and classifier compute; the model's when None.

    Raises:
        ValueError: the data are latents, which have no pictures to compare with, or they or the classifier do not fit
            the model.
    """
    from marval.data import FASHION_FORM, check_classes, check_data, load_images
    from marval.evaluate.features import find_features
    from marval.evaluate.judge import held_out, judge_by_reference, load_judge

    spec, device = data or pipeline.config.data, device or pipeline.device
    if classifier is None and spec.partition(":")[0] == "fashion-mnist":
        classifier = Path("fashion-judge")
    # A model of latents is trained on a cache, but its pictures are compared with pictures.
    check = check_data if pipeline.config.space.kind == "pixels" else check_classes

    def real_images() -> "ImageData":
        channels = getattr(pipeline.config.space, "channels", 3)
        images = load_images(spec, size=pipeline.config.space.image_size, channels=channels, limit=limit)
        check(images, pipeline.config)
        return images

    if reference is not None:
        judge = judge_by_reference(reference, classifier, features, device)
    elif spec.startswith("latents:"):
        raise ValueError(f"{spec} holds no pictures to compare with: name them with {option} folder:DIR, or do not ask")
    elif not main:
        judge = held_out(find_features(features).to(device), classifier, device)
    else:
        if spec == "fashion-mnist":
            check(FASHION_FORM, pipeline.config)  # the images themselves may never be read
        judge = load_judge(spec, classifier, real_images, features=features, sample=sample, device=device)
    check_classifier(judge, pipeline)
    return judge


def training_judge(
    pipeline: "Pipeline", data: str | None, judge_data: str | None, classifier: Path | None, workers: "Workers"
) -> "Judge":
    """The judge of a training run's probes: on the run's device, with a sample of the real images on the main process.

    Raises:
        ValueError: as `judge_for`.
    """
    return judge_for(
        pipeline, judge_data or data, classifier, main=workers.main, limit=JUDGED, option="--judge-data",
        device=workers.device,
    )  # fmt: skip


def anchor_for(
    pipeline: "Pipeline", teacher: str, data: str | None, recipe: DistillConfig, settings: TuneConfig
) -> "Anchor":
    """The anchor of tuning: the student's teacher, its training data, and the settings that it was distilled with.

    Raises:
        ValueError: the model is no student, `teacher` is another student or a model of other sizes, or the data do not
            fit.
    """
    from marval.train.anchor import anchor_of

    return anchor_of(load_pipeline(teacher, "cpu"), pipeline, data_of(pipeline, data), recipe, settings)


def check_classifier(judge: "Judge", pipeline: "Pipeline") -> None:
    """A judge's classifier tells the model's classes apart, in pictures such as it draws.

    Raises:
        ValueError: other classes, or another number of channels.
    """
    from marval.config import PixelSpace

    config, classifier = pipeline.config, judge.classifier
    channels = config.space.channels if isinstance(config.space, PixelSpace) else 3
    if classifier is not None and (classifier.class_names, classifier.channels) != (config.class_names, channels):
        raise ValueError(
            f"--judge tells {', '.join(classifier.class_names[:4])}, ... apart in pictures of {classifier.channels} "
            f"channels, {config.name} draws {', '.join(config.class_names[:4])}, ... in {channels}: make another with "
            "marval train-classifier"
        )
