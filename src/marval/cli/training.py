"""The verbs that make models: train, distill, tune, and train classifier."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import marval
from marval.checks import Checked, Rule
from marval.cli.arguments import data_of, usable_device
from marval.config import Count, Name, Pairs
from marval.presets import ENCODER, DistillConfig, Preset, RunConfig, TrainConfig, TuneConfig, settings_of
from marval.runtime.provenance import command_line

if TYPE_CHECKING:
    from marval.config import ModelConfig
    from marval.rewards import FrechetReward, WeightedReward
    from marval.runtime import distributed, folder

Probes = Annotated[int, Rule("0, or a whole number from 2", lambda x: x == 0 or x >= 2)]
JUDGED = 10_000  # real images that a training run's judge reads at most


@dataclass(frozen=True)
class Run(Checked):
    """output"""

    out: Path = Path("runs/teacher")  # the run's folder; the model is left in its sub-folder model
    resume: bool = False  # go on from the last saved state; --updates, rates and what changes no result may differ
    tensorboard: bool = False  # write TensorBoard's event files beside the log
    shard: bool = False  # under torchrun: split the networks over the GPUs, too, where they do not fit one
    device: str = "auto"  # auto, cpu, cuda or cuda:N

    def check(self) -> str:
        """Refuse an output that cannot be used, before anything is read; the device by its name."""
        from marval.runtime.folder import check_resume

        check_resume(self.out, self.resume)
        return usable_device(self.device)

    @contextlib.contextmanager
    def start(self, device: str, settings: RunConfig) -> "Iterator[folder.Run]":
        """Start the processes that share the work, and lock the run's folder for them.

        Raises:
            ValueError: a batch that cannot be split over them.
        """
        from marval.runtime.distributed import start_workers
        from marval.runtime.folder import open_run

        with (
            start_workers(device, self.shard) as workers,
            open_run(self.out, resume=self.resume, workers=workers, tensorboard=self.tensorboard) as run,
        ):
            workers.parts(settings.batch_size, settings.accumulate)
            yield run


@dataclass(frozen=True)
class Teacher(Checked):
    """what to train"""

    preset: Preset = "fashion-mnist"  # the recipe; imagenet256-* are MAR's, on a cache of latents
    data: str | None = None  # folder:DIR (a sub-folder a class, or captions), latents:DIR (marval cache), fashion-mnist
    size: str | None = None  # pixels that a folder's images are brought to, 32 or 48x24 (WIDTHxHEIGHT); inferred
    init: str | None = None  # a model of the same sizes to start from
    encoder: str = ENCODER  # of captions: the sentence encoder, this package or a folder (docs/text.md)
    name: Name = "teacher"  # the model's name


def train(*, what: Teacher, settings: TrainConfig, output: Run) -> None:
    """Train a MAR teacher.

    marval train --data folder:my-images --updates 5000 --out runs/mine
    torchrun --nproc_per_node 8 -m marval train --preset imagenet256-base --data latents:cache --out runs/mar-base
    """
    from marval.data import LatentData, load_data, parse_size
    from marval.train.teacher import latent_teacher_config, teacher_config, train_teacher

    device, spec = output.check(), what.data or what.preset
    if what.preset != "fashion-mnist" and not spec.startswith("latents:"):
        raise ValueError(f"{what.preset} trains on latents: make a cache with marval cache, then --data latents:DIR")
    start = marval.load(what.init).model if what.init is not None else None
    images = load_data(spec, size=parse_size(what.size) if what.size else None, encoder=what.encoder)
    if isinstance(images, LatentData):
        config = latent_teacher_config(what.preset, what.name, images, spec, command_line())
    else:
        config = teacher_config(what.name, images, spec, command_line())
    with output.start(device, settings) as run:
        if run.workers.main:
            channels, rows, columns = images.shape
            kind = f"latents of {channels} channels" if isinstance(images, LatentData) else "pixels"
            print(f"{spec}: {len(images):,} images, {len(images.class_names):,} classes, {columns}x{rows} {kind}")
        done = train_teacher(config, settings, images, run, init=start)
        if run.workers.main:
            print(f"{output.out / 'model'}: {done} of {settings.updates} updates done")


@dataclass(frozen=True)
class StudentRun(Run):
    """output"""

    out: Path = Path("runs/student")
    probe_samples: Probes = 500  # images of the small Fréchet distance that is logged; 0: none


@dataclass(frozen=True)
class Student(Checked):
    """what to train on"""

    preset: Preset = "fashion-mnist"  # the recipe; imagenet256-* are the paper's
    data: str | None = None  # the training images, or latents; the teacher's when left out
    judge_data: str | None = None  # folder:DIR, real images for the logged distance, where the data are latents


def distill(teacher: str, *, what: Student, settings: DistillConfig, output: StudentRun) -> None:
    """Distil a teacher's inner diffusion chain into one call (GSIM).

    marval distill fashion-teacher --out runs/student
    marval distill runs/mine --objective gsim --updates 2000 --out runs/my-student

    Args:
        teacher: a bundled model, or a model's or run's folder
    """
    from marval.evaluate.evaluate import probe
    from marval.evaluate.judge import make_judge
    from marval.train.distill import distill as train_student
    from marval.train.distill import student_config

    device, samples = output.check(), output.probe_samples
    pipeline = marval.load(teacher)
    _, settings = student_config(pipeline.config, settings)
    images = data_of(pipeline, what.data)
    config = dataclasses.replace(pipeline.config, source=command_line())
    with output.start(device, settings) as run:
        watch = None
        if samples and len(images) > 1:  # one image has no Fréchet distance
            judge = make_judge(pipeline, what.judge_data or what.data, None, run.workers, limit=JUDGED)
            watch = probe(judge, samples, settings.iterations, run.workers)
        done = train_student(pipeline.model, config, settings, images, run, probe=watch)
        if run.workers.main:
            print(f"{output.out / 'model'}: {done} of {settings.updates} updates done")


@dataclass(frozen=True)
class TunedRun(Run):
    """output"""

    out: Path = Path("runs/tuned")
    probe_samples: Pairs | None = None  # images of the held-out figures; 1000, or two of each class where that is more


@dataclass(frozen=True)
class Rewards(Checked):
    """what to tune with"""

    preset: Preset = "fashion-mnist"  # the recipe; imagenet256-* are the paper's
    reward: str = "classifier"  # of the list above, NAME:FILE (:FOLDER, :HUB-ID), file.py:function, or A=1,B=0.5
    held_out: str | None = None  # rewards that are only watched, written likewise; the best model has the highest
    judge: Path | None = None  # the held-out classifier (optional; Fashion-MNIST has a bundled one)
    judge_data: str | None = None  # folder:DIR, the real images of distances, where the data are latents
    teacher: str | None = None  # the anchor's teacher (with --anchor)
    data: str | None = None  # the anchor's and the distances' images, or latents; the student's when left out


def tune(student: str, *, rewards: Rewards, settings: TuneConfig, output: TunedRun) -> None:
    """Tune a student with a differentiable reward (MARVAL-RL).

    marval tune fashion-student --reward classifier --out runs/tuned
    marval tune runs/my-student --reward fd:efficientnet=1,my_rewards.py:score=0.1,classifier:c.safetensors=0.5

    Rewards: pickscore, clip, image-reward, hps-v2, aesthetic, text-image, classifier (docs/tuning.md says where their
    weights come from); your own function of images in [0, 1] and prompts (prompt.class_name is the class), which
    returns one differentiable number per image; or fd:SPACE, the Fréchet distance to the real images in the features
    efficientnet, classifier, classifier:FILE, pixels or file.py:function.

    Args:
        student: a bundled model, or a model's or run's folder
    """
    from marval.evaluate.evaluate import probe
    from marval.evaluate.judge import RewardJudge, make_judge
    from marval.rewards import WeightedReward, parse_rewards
    from marval.train.anchor import anchor_of
    from marval.train.tune import tune as tune_student
    from marval.train.tune import tuned_settings

    device = output.check()
    pipeline = marval.load(student)
    if (rewards.teacher is None) != (settings.anchor == 0):
        raise ValueError("--anchor and --teacher: expected both, a weight above 0 and the teacher, or neither")
    distances = any(re.split("[:=]", part.strip())[0] == "fd" for part in rewards.reward.split(","))
    settings, _ = tuned_settings(pipeline.config, settings, distances)
    config = dataclasses.replace(pipeline.config, source=command_line())
    samples = output.probe_samples or (1000 if config.encoder else max(1000, 2 * len(config.class_names)))
    anchor = None
    if rewards.teacher is not None:
        guide, recipe = marval.load(rewards.teacher), settings_of(DistillConfig, rewards.preset)
        anchor = anchor_of(guide, pipeline, data_of(pipeline, rewards.data), recipe, settings)
    with output.start(device, settings) as run:
        workers, held_out = run.workers, None
        spec = rewards.judge_data or rewards.data or config.data
        if rewards.held_out is not None:
            watched = WeightedReward(parse_rewards(rewards.held_out, workers.device))
            held_out = RewardJudge({"held out": watched}, settings.prompt, config, workers.device)
        distance = distance_to(spec, config, settings, workers)
        reward = WeightedReward(parse_rewards(rewards.reward, workers.device, distance))
        features = held_out_features(reward, rewards.judge, spec)
        judge = make_judge(pipeline, spec, rewards.judge, workers, features=features, limit=JUDGED)
        if workers.main and features is not None:
            print(f"the held-out Fréchet distance and diversity are on {judge.network.name}, which is not tuned on")
        if workers.main and judge.classifier is None and held_out is None:
            print("no --judge and no --held-out reward: the Fréchet distance and the diversity alone say when to stop")
        watch = probe(judge, samples, settings.default_iterations, workers, held_out)
        ended = tune_student(pipeline.model, config, reward, settings, run, probe=watch, anchor=anchor)
        if workers.main:
            print(f"{output.out / 'model'}: {ended}")


def distance_to(
    spec: str, config: "ModelConfig", settings: TuneConfig, workers: "distributed.Workers"
) -> "Callable[[str], FrechetReward]":
    """What makes the reward fd:SPACE of a feature space's name, against the real images that `spec` names."""
    from marval.evaluate.features import find_features
    from marval.evaluate.judge import measure_data, real_reader
    from marval.rewards.frechet import FrechetReward, RealMoments

    def make(name: str) -> FrechetReward:
        network = find_features(name, "reward fd").to(workers.device)

        def measure() -> tuple[RealMoments, str] | None:
            if not workers.main:
                return None
            real, _ = measure_data(network, spec, real_reader(spec, config, JUDGED))
            return RealMoments.of(real.mean, real.covariance), f"{real.features} of {real.data_sha256}"

        found = workers.agree(workers.together(measure))
        assert found is not None  # as the main process has it
        return FrechetReward(
            name, network, found[0], settings.moments_decay, found[1], workers.device, len(settings.iterations)
        )

    return make


def held_out_features(reward: "WeightedReward", judge: Path | None, spec: str) -> str | None:
    """Name the first features that no distance is tuned on: EfficientNet's (None), the judge's, or pixels.

    Raises:
        ValueError: distances are tuned on all of them.
    """
    from marval.rewards import FrechetReward

    tuned = {part.name for part, _ in reward.rewards.values() if isinstance(part, FrechetReward)}
    judge = judge or (Path("fashion-judge") if spec.startswith("fashion-mnist") else None)
    others = [None, *([f"classifier:{judge}"] if judge else []), "pixels"]
    free = [name for name in others if (name or "efficientnet") not in tuned]
    if not free:
        raise ValueError(f"--reward {', '.join(reward.rewards)}: no features are left to judge on; leave out pixels")
    return free[0]


@dataclass(frozen=True)
class Classifier(Checked):
    """options"""

    data: str = "fashion-mnist"  # fashion-mnist, fashion-mnist:FOLDER, or folder:DIR
    size: str | None = None  # pixels that a folder's images are brought to, as for marval train; inferred
    architecture: Literal["plain", "residual"] = "plain"  # plain for a reward, residual for a judge
    epochs: Count = 4  # passes over the images
    seed: int = 0  # of weights, order and augmentation
    out: Path = Path("runs/classifier.safetensors")  # the classifier's file
    device: str = "auto"  # auto, cpu, cuda or cuda:N


def train_classifier(*, what: Classifier) -> None:
    """Train a small classifier: a reward to tune with, or the held-out judge.

    marval train classifier --data folder:my-images --out runs/reward.safetensors
    marval train classifier --data folder:my-images --architecture residual --epochs 6 --out runs/judge.safetensors
    """
    from marval.data import load_images, parse_size, split_data
    from marval.io.files import check_output
    from marval.train.classifier import check_classes
    from marval.train.classifier import train_classifier as run

    check_output(what.out, folder=False)
    device = usable_device(what.device)
    images = load_images(what.data, size=parse_size(what.size) if what.size else None, encoder=ENCODER)
    check_classes(images)
    own = not what.data.startswith("fashion-mnist")
    images, test = split_data(images, what.seed) if own else (images, load_images(what.data, split="test"))
    accuracy = run(what.architecture, images, test, what.out, epochs=what.epochs, seed=what.seed, device=device)
    print(f"{what.out}: accuracy {accuracy:.4f} on {len(test)} images that it was not trained on")
