"""The verbs that make models: train, distill, tune and train-classifier."""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from tyro.conf import OmitArgPrefixes, Positional

from marval.cli.arguments import anchor_for, data_of, load_pipeline, training_judge, usable_device
from marval.config import Chain, Count, ModelConfig, Name, OneStep, Pairs, check
from marval.presets import DistillConfig, TrainConfig, TuneConfig, settings_of
from marval.runtime.provenance import command_line

if TYPE_CHECKING:
    from marval.pipeline import Pipeline
    from marval.runtime.distributed import Workers
    from marval.train.anchor import Anchor

Settings = TypeVar("Settings", DistillConfig, TuneConfig)
Preset = Literal["fashion-mnist", "imagenet256-base", "imagenet256-large", "imagenet256-huge"]
RECIPES: dict[str, type[TrainConfig] | type[DistillConfig] | type[TuneConfig]] = {
    "train": TrainConfig, "distill": DistillConfig, "tune": TuneConfig,
}  # fmt: skip


def preset_settings(verb: str, arguments: Sequence[str]) -> TrainConfig | DistillConfig | TuneConfig | None:
    """The defaults of `train`, `distill` or `tune` for the preset among its arguments; None for other verbs.

    Raises:
        ValueError: an unknown preset.
    """
    if verb not in RECIPES:
        return None
    if verb == "train":  # there it has no option's name before it
        flags = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(TrainConfig) if field.type is bool}
        values = {
            i + 1
            for i, argument in enumerate(arguments)
            if argument.startswith("--") and not argument.startswith("--no-") and "=" not in argument
            and argument not in flags | {"--resume"}
        }  # fmt: skip
        free = (a for i, a in enumerate(arguments) if i not in values and a in get_args(Preset))
        return recipe(verb, next(free, "fashion-mnist"))
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", nargs="?", default="fashion-mnist")
    return recipe(verb, parser.parse_known_args(arguments)[0].preset)


def recipe(verb: str, preset: str) -> Any:
    """The settings of a preset for a verb.

    Raises:
        ValueError: an unknown preset.
    """
    return settings_of(RECIPES[verb], preset)  # type: ignore[type-var]


def with_size(spec: str, size: str | None) -> tuple[int, int] | None:
    """The rows and columns that `--size` says for a folder's images; None where it says nothing.

    Raises:
        ValueError: not a size that can be cut, or the data have a size of their own.
    """
    from marval.data import parse_size

    if size is not None and not spec.startswith("folder:"):
        raise ValueError(f"--size {size}: {spec} has its own size; expected --data folder:DIR with it")
    return None if size is None else parse_size(size)


def with_few_tokens(settings: Settings, pipeline: "Pipeline") -> Settings:
    """The settings for a model that may have fewer tokens than the default K, and a line that says so."""
    fitting = settings.within(pipeline.config.mar.num_tokens)
    if fitting != settings:
        name, count = pipeline.config.name, fitting.iterations
        print(f"{name} has {count} tokens: K is {count}, not {settings.iterations}")
    return fitting


def train(
    preset: Positional[Preset] = "fashion-mnist",
    *,
    data: str | None = None,
    size: str | None = None,
    out: Path = Path("runs/teacher"),
    name: str = "teacher",
    init: str | None = None,
    settings: OmitArgPrefixes[TrainConfig] = TrainConfig(),
    resume: bool = False,
    device: str = "auto",
) -> None:
    """Train a MAR teacher.

    marval train fashion-mnist --out runs/teacher

    marval train --data folder:my-images --updates 5000 --out runs/mine

    Args:
        preset: the recipe whose settings are the defaults below; imagenet256-* are MAR's, on a cache of latents.
        data: "fashion-mnist", "fashion-mnist:FOLDER", "folder:DIR" with one sub-folder of images per class, or
            "latents:DIR" (marval cache-latents).
        size: pixels that a folder's images are brought to, such as 32, or 48x24 (WIDTHxHEIGHT); inferred when left out.
        out: the run's folder; the model is left in its sub-folder `model`.
        name: the model's name.
        init: a model of the same sizes to start from, instead of fresh weights.
        resume: go on from the run's last saved state, which must be there. What may differ: updates, learning rates,
            warmup, decay, save-every, log-every, accumulate, checkpoint-blocks and device.
        device: "auto", "cpu", "cuda", "mps", ...
    """
    from marval.data import LatentData, load_data
    from marval.runtime.distributed import start_workers
    from marval.runtime.folder import check_resume, open_run
    from marval.train.teacher import latent_teacher_config, teacher_config, train_teacher

    check_resume(out, resume)
    check("--name", name, Name)
    spec, device = data or preset, usable_device(device)
    if preset != "fashion-mnist" and not spec.startswith("latents:"):
        raise ValueError(f"{preset} trains on latents: make a cache with marval cache-latents, then --data latents:DIR")
    images = load_data(spec, size=with_size(spec, size))
    if isinstance(images, LatentData):
        config = latent_teacher_config(preset, name, images, spec, command_line())
    else:
        config = teacher_config(name, images, spec, command_line())
    start = load_pipeline(init, "cpu").model if init is not None else None
    with start_workers(device) as workers, open_run(out, resume=resume, workers=workers) as run:
        done = train_teacher(config, settings, images, run, init=start)
        say_where(out, done, settings.updates, workers)


def distill(
    teacher: Positional[str],
    *,
    preset: Preset = "fashion-mnist",
    data: str | None = None,
    judge_data: str | None = None,
    out: Path = Path("runs/student"),
    settings: OmitArgPrefixes[DistillConfig] = DistillConfig(),
    probe_samples: int = 500,
    resume: bool = False,
    device: str = "auto",
) -> None:
    """Distil a teacher's inner diffusion chain into one call (GSIM).

    marval distill fashion-teacher --out runs/student

    marval distill runs/mine --objective gsim --updates 2000 --out runs/my-student

    Args:
        teacher: a bundled model's name, or a model's or run's folder.
        preset: the recipe whose settings are the defaults below; imagenet256-* are the paper's.
        data: the training images; those of the teacher when left out.
        judge_data: the real images of the logged Frechet distance, where `data` are latents: "folder:DIR".
        out: the run's folder; the model is left in its sub-folder `model`.
        probe_samples: images of the small Fréchet distance that is logged (0: none).
        resume: go on from the run's last saved state, which must be there. What may differ: updates, learning rates,
            warmup, decay, save-every, log-every, accumulate, checkpoint-blocks and device.
        device: "auto", "cpu", "cuda", "mps", ...
    """
    from marval.evaluate.probe import probe
    from marval.runtime.distributed import start_workers
    from marval.runtime.folder import check_resume, open_run
    from marval.train.distill import distill as distill_teacher

    check_resume(out, resume)
    if probe_samples:
        check("--probe-samples", probe_samples, Pairs)
    device = usable_device(device)
    pipeline = load_pipeline(teacher, "cpu")
    if not isinstance(pipeline.config.draw, Chain):
        raise ValueError(f"{teacher} is a one-step student already: expected a teacher")
    settings = with_few_tokens(settings, pipeline)
    images = data_of(pipeline, data)
    if probe_samples and len(images) < 2:
        print("one image has no Fréchet distance: none is logged")
        probe_samples = 0
    with start_workers(device) as workers, open_run(out, resume=resume, workers=workers) as run:
        judge = training_judge(pipeline, data, judge_data, None, workers) if probe_samples else None
        done = distill_teacher(
            pipeline.model,
            dataclasses.replace(pipeline.config, source=command_line()),
            settings,
            images,
            run,
            probe=probe(judge, probe_samples, settings.iterations, workers=workers) if judge else None,
        )
        say_where(out, done, settings.updates, workers)


def tune(
    student: Positional[str],
    *,
    preset: Preset = "fashion-mnist",
    reward: str = "classifier",
    classifier: Path | None = None,
    held_out: str | None = None,
    teacher: str | None = None,
    data: str | None = None,
    judge: Path | None = None,
    judge_data: str | None = None,
    out: Path = Path("runs/tuned"),
    settings: OmitArgPrefixes[TuneConfig] = TuneConfig(),
    probe_samples: int | None = None,
    resume: bool = False,
    device: str = "auto",
) -> None:
    """Tune a student with a differentiable reward (MARVAL-RL).

    marval tune fashion-student --reward classifier --out runs/tuned

    marval tune runs/my-student --reward my_rewards.py:score=1,classifier=0.5 --classifier c.safetensors

    Args:
        student: a bundled model's name, or a model's or run's folder.
        preset: the recipe whose settings are the defaults below; imagenet256-* are the paper's.
        reward: pickscore, clip, image-reward, hps-v2, aesthetic, text-image or classifier (docs/tuning.md: weights and
            licences; their files come from the hub or its cache; NAME:FOLDER and NAME:HUB-ID name others); or your own,
            file.py:function, called with images in [0, 1] and prompts (prompt.class_name is the class), which returns
            one differentiable number per image; or several with factors: "pickscore=1,clip:FOLDER=0.5".
        classifier: the classifier of that reward; the bundled one for Fashion-MNIST when left out.
        held_out: rewards that are only watched, written likewise: the best model has the highest.
        teacher: the teacher that the anchor needs (with --anchor).
        data: the anchor's training images, or latents; those of the student when left out.
        judge: the held-out classifier, which may be missing; the bundled one for Fashion-MNIST when left out.
        judge_data: the real images that drawn ones are compared with, where `data` are latents: "folder:DIR".
        out: the run's folder; the best model is left in its sub-folder `model`.
        probe_samples: images of the held-out figures; 1000, or two of each class where these are more, when left out.
        resume: go on from the run's last saved state, which must be there. What may differ: updates, learning rates,
            warmup, decay, save-every, log-every, accumulate, checkpoint-blocks and device.
        device: "auto", "cpu", "cuda", "mps", ...
    """
    from marval.evaluate.probe import probe
    from marval.rewards import WeightedReward, parse_rewards
    from marval.runtime.distributed import start_workers
    from marval.runtime.folder import check_resume, open_run
    from marval.train.tune import tune as tune_student

    check_resume(out, resume)
    if probe_samples is not None:
        check("--probe-samples", probe_samples, Pairs)
    device = usable_device(device)
    pipeline = load_pipeline(student, "cpu")
    if not isinstance(pipeline.config.draw, OneStep):
        raise ValueError(f"{student} is a teacher: distil it first (marval distill)")
    settings = with_few_tokens(settings, pipeline)
    config = pipeline.config
    samples = max(1000, 2 * len(config.class_names)) if probe_samples is None else probe_samples
    anchor = None
    if settings.anchor and teacher is not None:
        anchor = anchor_for(pipeline, teacher, data, recipe("distill", preset), settings)
    with start_workers(device) as workers, open_run(out, resume=resume, workers=workers) as run:
        tuned = WeightedReward(parse_rewards(reward, classifier, workers.device))
        watched = WeightedReward(parse_rewards(held_out, None, workers.device)) if held_out is not None else None
        judged = training_judge(pipeline, data, judge_data, judge, workers)
        if workers.main:
            for line in watching(config, samples, judged.classifier is not None, watched is not None, anchor):
                print(line)
        ended = tune_student(
            pipeline.model,
            dataclasses.replace(config, source=command_line()),
            tuned,
            settings,
            run,
            probe=probe(
                judged, samples, settings.iterations, workers=workers, held_out=watched, prompt=settings.prompt
            ),
            anchor=anchor,
        )
        if workers.main:
            print(f"{out / 'model'}: {ended}")


def watching(
    config: ModelConfig, samples: int, classifier: bool, held_out: bool, anchor: "Anchor | None"
) -> Iterator[str]:
    """What a tuning run says before it starts, where it is not what one would expect."""
    classes = len(config.class_names)
    if not classifier and not held_out:
        yield (
            "no held-out classifier (--judge FILE, by marval train-classifier) and no --held-out reward: the Frechet "
            "distance and the diversity alone say when to stop, and the latest model that keeps both is kept"
        )
    if samples <= classes:
        yield (
            f"{samples} images of {classes} classes: no class has two, so the diversity cannot be measured, and does "
            f"not stop the run; --probe-samples {2 * classes} gives each two"
        )
    elif samples < 2 * classes:
        yield (
            f"{samples} images of {classes} classes: the diversity is the mean over the {samples - classes} classes "
            f"that have two; --probe-samples {2 * classes} gives each two"
        )
    if anchor is not None:
        w, schedule = anchor.settings.guidance, anchor.settings.guidance_schedule
        yield f"the anchor's teacher is guided as {config.name} was distilled: w = {w:g}, {schedule}" + (
            "; if it was another, write guidance and guidance_schedule into draw in its config.json" if w == 1 else ""
        )


def say_where(out: Path, done: int, total: int, workers: "Workers") -> None:
    """The last line of a training run."""
    if workers.main:
        print(f"{out / 'model'}: {done} of {total} updates done" + ("; go on with --resume" if done < total else ""))


def train_classifier(
    preset: Positional[Literal["fashion-mnist"]] = "fashion-mnist",
    *,
    data: str | None = None,
    size: str | None = None,
    architecture: Literal["plain", "residual"] = "plain",
    epochs: int = 4,
    seed: int = 0,
    out: Path = Path("runs/classifier.safetensors"),
    device: str = "auto",
) -> None:
    """Train a small classifier: "plain" for the reward, "residual" for the held-out judge.

    marval train-classifier fashion-mnist --architecture plain --out runs/classifier.safetensors

    marval train-classifier --data folder:my-images --architecture residual --epochs 6 --out runs/judge.safetensors

    Args:
        preset: the data set.
        data: "fashion-mnist", "fashion-mnist:FOLDER", or "folder:DIR".
        size: pixels that a folder's images are brought to, as marval train takes it; inferred when left out.
        architecture: the network and its recipe.
        epochs: passes over the images.
        seed: of weights, order and augmentation.
        out: the classifier's file.
        device: "auto", "cpu", "cuda", "mps", ...
    """
    from marval.data import load_images, split_data
    from marval.io.files import check_output
    from marval.train.classifier import check_classes, plan_steps
    from marval.train.classifier import train_classifier as run

    check_output(out, folder=False)
    check("--epochs", epochs, Count)
    spec, device = data or preset, usable_device(device)
    images = load_images(spec, size=with_size(spec, size))
    check_classes(images)
    if spec.startswith("fashion-mnist"):
        test = load_images(spec, split="test")
    else:
        images, test = split_data(images, seed)
    accuracy = run(architecture, images, test, out, epochs=epochs, seed=seed, device=device)
    batch, steps = plan_steps(len(images), epochs)
    print(
        f"{out}: accuracy {accuracy:.4f} on {len(test)} images that it was not trained on, after {steps} steps with "
        f"{batch} of {len(images)} images each"
    )
