"""The command line: one verb per job. Heavy imports stand inside the verbs, so that --help answers at once."""

import dataclasses
import difflib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import OmitArgPrefixes, Positional

from marval.config import Chain, DistillConfig, FinetuneConfig, TrainConfig

if TYPE_CHECKING:
    from marval.data import ImageData
    from marval.evaluate.evaluate import Judge
    from marval.pipeline import Pipeline


def train(
    preset: Positional[Literal["fashion-mnist"]] = "fashion-mnist",
    *,
    data: str | None = None,
    out: Path = Path("runs/teacher"),
    name: str = "teacher",
    init: str | None = None,
    settings: OmitArgPrefixes[TrainConfig] = TrainConfig(),
    resume: bool = False,
    device: str = "auto",
) -> None:
    """Train a MAR teacher.

    marval train fashion-mnist --out runs/teacher

    marval train --data folder:my-images --iterations 5000 --out runs/mine

    Args:
        preset: the recipe.
        data: "fashion-mnist", "fashion-mnist:FOLDER", or "folder:DIR" with one sub-folder of images per class.
        out: the run's folder; the model is left in its sub-folder `model`.
        name: the model's name.
        init: a model of the same sizes to start from, instead of fresh weights.
        resume: go on from the run's last saved state.
        device: "auto", "cpu", "cuda", "mps", ...
    """
    from marval.data import load_data
    from marval.train.teacher import teacher_config, train_teacher

    images = load_data(data or preset)
    config = teacher_config(name, images, data or preset, _source())
    start = _load(init, device).model if init is not None else None
    train_teacher(config, settings, images, out, init=start, resume=resume, device=_device(device))


def distill(
    teacher: Positional[str],
    *,
    data: str | None = None,
    out: Path = Path("runs/student"),
    settings: OmitArgPrefixes[DistillConfig] = DistillConfig(),
    probe_samples: int = 500,
    resume: bool = False,
    device: str = "auto",
) -> None:
    """Distil a teacher's inner diffusion chain into one call (GSIM).

    marval distill fashion-teacher --out runs/student

    marval distill runs/mine --objective gsim --iterations 2000 --out runs/my-student

    Args:
        teacher: a bundled model's name, or a model's or run's folder.
        data: the training images; those of the teacher when left out.
        out: the run's folder; the model is left in its sub-folder `model`.
        probe_samples: images of the small Fréchet distance that is logged (0: none).
        resume: go on from the run's last saved state.
        device: "auto", "cpu", "cuda", "mps", ...
    """
    from marval.evaluate.evaluate import probe
    from marval.train.distill import distill as run

    pipeline = _load(teacher, device)
    images = _data_of(pipeline, data)
    judge = _judge(pipeline, data, None) if probe_samples else None
    run(
        pipeline.model,
        dataclasses.replace(pipeline.config, source=_source()),
        settings,
        images,
        out,
        resume=resume,
        probe=probe(judge, probe_samples, settings.sample_iterations) if judge else None,
    )


def finetune(
    student: Positional[str],
    *,
    reward: str = "classifier",
    classifier: Path | None = None,
    teacher: str | None = None,
    data: str | None = None,
    judge: Path | None = None,
    out: Path = Path("runs/tuned"),
    settings: OmitArgPrefixes[FinetuneConfig] = FinetuneConfig(),
    probe_samples: int = 1000,
    resume: bool = False,
    device: str = "auto",
) -> None:
    """Tune a student with a differentiable reward (MARVAL-RL).

    marval finetune fashion-student --reward classifier --out runs/tuned

    marval finetune runs/my-student --reward my_rewards:brightness=1,classifier=0.5 --classifier c.safetensors

    Args:
        student: a bundled model's name, or a model's or run's folder.
        reward: "classifier" or package.module:function, or several with weights: "classifier=1,my:function=0.5".
        classifier: the classifier of that reward; the bundled one for Fashion-MNIST when left out.
        teacher: the teacher of the GSIM anchor (with --anchor).
        data: the training images; those of the student when left out.
        judge: the held-out classifier; the bundled one for Fashion-MNIST when left out.
        out: the run's folder; the best model is left in its sub-folder `model`.
        probe_samples: images of the held-out figures.
        resume: go on from the run's last saved state.
        device: "auto", "cpu", "cuda", "mps", ...
    """
    from marval.evaluate.evaluate import probe
    from marval.rewards import find_reward, weighted_reward
    from marval.train.finetune import Anchor
    from marval.train.finetune import finetune as run

    pipeline = _load(student, device)
    held_out = _judge(pipeline, data, judge)
    if held_out.classifier is None:
        raise ValueError("tuning needs a held-out classifier: make one with marval train-classifier, then --judge FILE")
    parts = {}
    for part in reward.split(","):
        name, _, weight = part.partition("=")
        try:
            parts[name] = (find_reward(name, classifier, pipeline.device), float(weight or 1))
        except ValueError as error:
            raise ValueError(f"--reward {reward}: {error}") from error
    anchor = None
    if teacher is not None:
        guide = _load(teacher, device)
        if not isinstance(guide.config.draw, Chain):
            raise ValueError(f"--teacher {teacher}: this is a one-step student; expected the teacher it came from")
        distilling = DistillConfig().with_guidance_of(guide.config.draw)
        anchor = Anchor(guide.model, _data_of(pipeline, data), distilling)
    ended = run(
        pipeline.model,
        dataclasses.replace(pipeline.config, source=_source()),
        weighted_reward(parts),
        settings,
        out,
        probe=probe(held_out, probe_samples, settings.sample_iterations),
        anchor=anchor,
        resume=resume,
    )
    print(f"{out / 'model'}: {ended}")


def sample(
    model: Positional[str],
    *,
    classes: str | None = None,
    count: int = 16,
    iterations: int | None = None,
    seed: int = 0,
    order: Literal["random", "raster", "halton"] = "random",
    steps: int | None = None,
    guidance: float | None = None,
    temperature: float | None = None,
    out: Path = Path("samples"),
    device: str = "auto",
) -> None:
    """Draw images: PNG files and a grid.

    marval sample fashion-student --classes sneaker,bag --count 16 --out samples

    marval sample fashion-teacher --classes 0,1,2 --iterations 16 --steps 50 --guidance 2 --seed 7

    Args:
        model: a bundled model's name, or a model's or run's folder.
        classes: names or numbers, separated by commas; all of them when left out.
        count: how many images; the classes take turns.
        iterations: K, the AR iterations; the model's default when left out.
        seed: the first image's seed; the next images count on from it.
        order: in which order tokens are drawn.
        steps: T of a teacher's chain.
        guidance: w of a teacher; 1 is no guidance.
        temperature: of a teacher's chain.
        out: a folder for the pictures.
        device: "auto", "cpu", "cuda", "mps", ...
    """
    from marval.io.images import grid, save_picture, square_rows, to_pil

    if count < 1:
        raise ValueError(f"--count {count}: expected at least 1")
    pipeline = _load(model, device).with_chain(steps=steps, guidance=guidance, temperature=temperature)
    names = pipeline.config.class_names
    chosen = pipeline.labels(classes.split(",")) if classes else list(range(len(names)))
    labels = [chosen[i % len(chosen)] for i in range(count)]
    images = pipeline.sample(labels, seed=seed, iterations=iterations, order=order)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        save_picture(out / f"{i:05d}-{names[label].replace(' ', '-').replace('/', '-')}-{seed + i}.png", to_pil(image))
    save_picture(out / "grid.png", grid(square_rows(images), scale=max(1, 84 // images.shape[-1])))
    print(f"{count} images and grid.png in {out}")


def evaluate(
    models: Positional[tuple[str, ...]],
    *,
    iterations: tuple[int, ...] = (),
    samples: int = 10_000,
    batches: tuple[int, ...] = (1, 64),
    repeats: int = 5,
    steps: int | None = None,
    guidance: float | None = None,
    data: str | None = None,
    judge: Path | None = None,
    seed: int = 0,
    autocast: bool = False,
    out: Path = Path("results/evaluate.json"),
    device: str = "auto",
) -> None:
    """Measure models: FD-EfficientNet, held-out accuracy, diversity, time and FLOPs per image.

    marval evaluate fashion-student

    marval evaluate fashion-teacher fashion-student fashion-tuned --iterations 4 8 16 32 --samples 2000

    Args:
        models: bundled models' names, or models' or runs' folders.
        iterations: the numbers K of AR iterations; each model's default when left out.
        samples: images for the figures of quality (the real set's training split is the reference).
        batches: batch sizes to time at, interleaved over all models; none: no timing.
        repeats: timed rounds.
        steps: T of the teachers' chains.
        guidance: w of the teachers; 1 is no guidance.
        data: the real images; those of the model when left out.
        judge: the held-out classifier; the bundled one for Fashion-MNIST when left out.
        seed: of the samples.
        autocast: draw the samples for quality in bf16 (the result says so; times are always float32).
        out: the JSON file; rows that it holds already are not drawn again.
        device: "auto", "cpu", "cuda", "mps", ...
    """
    from marval.evaluate.evaluate import evaluate as run
    from marval.evaluate.evaluate import time_models
    from marval.evaluate.tables import print_table
    from marval.pipeline import find_model

    if not models:
        raise ValueError("name at least one model, for example: marval evaluate fashion-student")
    loaded = []
    for name in models:
        pipeline = _load(name, device)
        if isinstance(pipeline.config.draw, Chain):
            pipeline = pipeline.with_chain(steps=steps, guidance=guidance)
        loaded.append((find_model(name), pipeline))
    run(
        loaded,
        _judge(loaded[0][1], data, judge),
        iterations=iterations,
        samples=samples,
        out=out,
        seed=seed,
        autocast=autocast,
    )
    if batches:
        time_models(loaded, iterations=iterations, batches=batches, repeats=repeats, out=out)
    print_table(out)


def train_classifier(
    preset: Positional[Literal["fashion-mnist"]] = "fashion-mnist",
    *,
    data: str | None = None,
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
        architecture: the network and its recipe.
        epochs: passes over the images.
        seed: of weights, order and augmentation.
        out: the classifier's file.
        device: "auto", "cpu", "cuda", "mps", ...
    """
    from marval.data import load_data, split_data
    from marval.train.classifier import train_classifier as run

    images = load_data(data or preset)
    if (data or preset).startswith("fashion-mnist"):
        test = load_data(data or preset, split="test")
    else:
        images, test = split_data(images, seed)
    accuracy = run(architecture, images, test, out, epochs=epochs, seed=seed, device=_device(device))
    print(f"{out}: accuracy {accuracy:.4f} on {len(test)} images that it was not trained on")


def convert(
    kind: Positional[Literal["mar", "to-mar"]],
    source: Positional[str],
    out: Positional[Path],
    *,
    heads: int | None = None,
    image_size: int | None = None,
    vae_stride: int | None = None,
    patch_size: int | None = None,
    vae: str = "kl16",
    ema: bool = True,
) -> None:
    """Bring official MAR checkpoints into marval's form, or back.

    marval convert mar mar_base/checkpoint-last.pth models/mar-base --vae models/kl16

    marval convert to-mar runs/student student.pth

    Args:
        kind: "mar": an official .pth, flat safetensors or a folder with one, to a model folder; "to-mar": back.
        source: the checkpoint, or the model to write back.
        out: the model folder, or the .pth to write.
        heads: attention heads, where the widths are not MAR-B's, -L's or -H's.
        image_size: pixels a side; checked against the tensors.
        vae_stride: pixels a latent; the checkpoint's args or 16 when left out.
        patch_size: latents a token's side; the checkpoint's args or 1 when left out.
        vae: the VAE's folder or hub id, for the configuration.
        ema: take the averaged weights.
    """
    from marval.io.checkpoint import load_model, save_model
    from marval.io.official import Given, official_model, save_official
    from marval.pipeline import find_model

    if kind == "to-mar":
        save_official(out, load_model(find_model(source))[0])
    else:
        save_model(out, *official_model(source, Given(heads, image_size, vae_stride, patch_size), ema=ema, vae=vae))
    print(f"{source} -> {out}")


def demo(*, out: Path = Path("demo-out"), device: str = "auto") -> None:
    """The main job on the bundled models, in minutes: draw, time and score them, then distil a student live.

    marval demo

    marval demo --out my-demo

    Args:
        out: a folder for the picture and the report.
        device: "auto", "cpu", "cuda", "mps", ...
    """
    from marval.demo import run

    run(out, _device(device))


VERBS: dict[str, Callable[..., None]] = {
    "train": train,
    "distill": distill,
    "finetune": finetune,
    "sample": sample,
    "evaluate": evaluate,
    "train-classifier": train_classifier,
    "convert": convert,
    "demo": demo,
}


def main() -> None:
    """Run a verb; a `ValueError` becomes one line on standard error and exit code 2."""
    verb, arguments = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if verb in ("-h", "--help"):
        print(overview())
        return
    try:
        if verb not in VERBS:
            near = difflib.get_close_matches(verb, VERBS, n=1)
            raise ValueError(f"unknown verb {verb!r}: " + (f"did you mean {near[0]}?" if near else "see marval --help"))
        import tyro

        tyro.cli(VERBS[verb], prog=f"marval {verb}", args=arguments)
    except ValueError as error:
        if os.environ.get("MARVAL_DEBUG"):
            raise
        print(f"marval: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("marval: interrupted; a training run goes on with --resume", file=sys.stderr)
        raise SystemExit(130) from None


def overview() -> str:
    """What `marval --help` says."""
    lines = ["Masked auto-regressive diffusion in one step (MARVAL).", "", "usage: marval VERB [options]", ""]
    lines += [f"  {verb:<17} {(function.__doc__ or '').splitlines()[0]}" for verb, function in VERBS.items()]
    return "\n".join([*lines, "", "marval VERB --help lists a verb's options, with two commands to copy."])


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: not here ({str(error).splitlines()[0]})") from None
    return name


def _load(name: str, device: str) -> "Pipeline":
    from marval.pipeline import load

    return load(name, _device(device))


def _data_of(pipeline: "Pipeline", data: str | None) -> "ImageData":
    from marval.data import check_data, load_data

    images = load_data(data or pipeline.config.data, size=pipeline.config.space.image_size)
    check_data(images, pipeline.config)
    return images


def _judge(pipeline: "Pipeline", data: str | None, classifier: Path | None) -> "Judge":
    from marval.evaluate.evaluate import load_judge

    return load_judge(data or pipeline.config.data, classifier, lambda: _data_of(pipeline, data))


def _source() -> str:
    return " ".join(["marval", *sys.argv[1:]])
