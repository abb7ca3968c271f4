"""Configurations: frozen dataclasses, their JSON form and the presets. Imports no torch.

A field's annotation carries its rule; every configuration checks its fields where it is made.
"""

import dataclasses
import math
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints


class Rule(NamedTuple):
    """What a field's value must be, in words and as a test; NaN fails each of them."""

    expected: str
    holds: Callable[[Any], bool]


def plain_name(name: str) -> bool:
    """Whether a model's name can be part of a file's name: no path, nothing hidden, nothing invisible."""
    odd = any(mark in "/\\" or unicodedata.category(mark) in ("Cc", "Cs", "Zl", "Zp") for mark in name)
    return not odd and not name.startswith(".") and len(name) <= 100


Count = Annotated[int, Rule("a whole number from 1", lambda x: x >= 1)]
Pairs = Annotated[int, Rule("a whole number from 2", lambda x: x >= 2)]
Whole = Annotated[int, Rule("a whole number from 0", lambda x: x >= 0)]
Finite = Annotated[float, Rule("a finite number", lambda x: -math.inf < x < math.inf)]
Positive = Annotated[float, Rule("a finite number above 0", lambda x: 0 < x < math.inf)]
NotNegative = Annotated[float, Rule("a finite number from 0", lambda x: 0 <= x < math.inf)]
Limit = Annotated[float, Rule("a number above 0 (inf: no limit)", lambda x: x > 0)]
Share = Annotated[float, Rule("a number from 0 to 1", lambda x: 0 <= x <= 1)]
Decay = Annotated[float, Rule("a number from 0 to below 1", lambda x: 0 <= x < 1)]
Guidance = Annotated[float, Rule("a number from 0, where 1 is no guidance", lambda x: 0 <= x < math.inf)]
Timestep = Annotated[int, Rule("a number from 0 to 998 (1/alpha explodes at 999)", lambda x: 0 <= x < 999)]
Name = Annotated[str, Rule("a plain name: at most 100 characters, no / or \\, no dot in front", plain_name)]
Template = Annotated[
    str,
    Rule(
        "exactly one {} for the class and no other braces", lambda x: x.count("{}") == x.count("{") == x.count("}") == 1
    ),
]


def fits(value: object, kind: Any) -> bool:
    """Whether a value is of a field's type and keeps its rules."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return fits(value, parts[0]) and all(rule.holds(value) for rule in parts[1:] if isinstance(rule, Rule))
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is tuple:
        parts = parts[:1] * len(value) if isinstance(value, tuple) and parts[-1] is ... else parts
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(fits, value, parts))
    if kind in (int, float):  # a bool is no number here
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return isinstance(value, kind)


def wanted(kind: Any) -> str:
    """What `fits` asks of a value, in words."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return next((rule.expected for rule in parts[1:] if isinstance(rule, Rule)), wanted(parts[0]))
    if origin in (Union, UnionType):
        return " or ".join(wanted(part) for part in parts if part is not NoneType)
    if origin is Literal:
        return " or ".join(map(str, parts))
    if origin is tuple:
        return f"a list, each {wanted(parts[0])}"
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    return words.get(kind) or f"a {kind.__name__}"


def check(name: str, value: object, kind: Any) -> None:
    """Refuse a value that is not of the type `kind` or breaks a rule of it.

    Raises:
        ValueError: names the value and what was expected.
    """
    if not fits(value, kind):
        raise ValueError(f"{name} {value!r}: expected {wanted(kind)}")


class Checked:
    """A dataclass whose fields are checked when it is made.

    Raises:
        ValueError: names the first field that is of another type or breaks its rule.
    """

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self), include_extras=True).items():
            check(name, getattr(self, name), kind)


@dataclass(frozen=True)
class MARConfig(Checked):
    """Sizes of the context network and the token head."""

    token_grid: tuple[Count, Count]  # rows, columns
    token_dim: Count  # channels C of one token
    num_classes: Count
    encoder_dim: Count
    encoder_depth: Whole
    encoder_heads: Count
    decoder_dim: Count
    decoder_depth: Whole
    decoder_heads: Count
    head_width: Count
    head_depth: Whole
    buffer_size: Whole = 64
    mlp_ratio: Positive = 4.0
    learn_variance: bool = True
    dropout: Decay = 0.0  # in training only

    def __post_init__(self) -> None:
        super().__post_init__()
        for width, heads in ((self.encoder_dim, self.encoder_heads), (self.decoder_dim, self.decoder_heads)):
            if width % heads:
                raise ValueError(f"{heads} attention heads for {width} channels: expected a number that divides them")

    @property
    def num_tokens(self) -> int:
        """L, the number of tokens of an image."""
        return math.prod(self.token_grid)

    @classmethod
    def fashion(cls, token_grid: tuple[int, int], token_dim: int, num_classes: int) -> "MARConfig":
        """The small model that two CPU cores can train: 3 million parameters for 49 tokens of 16 channels."""
        return cls(
            token_grid, token_dim, num_classes,
            encoder_dim=128, encoder_depth=3, encoder_heads=4,
            decoder_dim=128, decoder_depth=3, decoder_heads=4,
            head_width=256, head_depth=5, buffer_size=4, learn_variance=False,
        )  # fmt: skip

    @classmethod
    def imagenet256(cls, size: "Size") -> "MARConfig":
        """MAR-B, MAR-L and MAR-H on 16x16 latents of KL-16 (MAR, appendix B): 208M, 479M and 943M parameters."""
        width, depth, heads, head_depth, head_width = {
            "base": (768, 12, 12, 6, 1024),
            "large": (1024, 16, 16, 8, 1280),
            "huge": (1280, 20, 16, 12, 1536),
        }[size]
        return cls(
            (16, 16), 16, 1000,
            encoder_dim=width, encoder_depth=depth, encoder_heads=heads,
            decoder_dim=width, decoder_depth=depth, decoder_heads=heads,
            head_width=head_width, head_depth=head_depth, dropout=0.1,
        )  # fmt: skip


@dataclass(frozen=True)
class PixelSpace(Checked):
    """Tokens are `patch` x `patch` pixel patches: `(image - shift) * scale`, images in [0, 1]."""

    image_size: tuple[Count, Count]  # rows, columns
    channels: Count
    patch: Count
    shift: Finite
    scale: Positive
    kind: Literal["pixels"] = "pixels"

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.image_size[0] // self.patch, self.image_size[1] // self.patch

    @property
    def token_dim(self) -> int:
        """Channels of one token."""
        return self.channels * self.patch**2

    @property
    def token_range(self) -> tuple[float, float]:
        """The values that black and white have as tokens."""
        return (0 - self.shift) * self.scale, (1 - self.shift) * self.scale

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sides(self.image_size, self.patch)


@dataclass(frozen=True)
class LatentSpace(Checked):
    """Tokens are `patch` x `patch` patches of a VAE's latent: `(latent - shift) * scale`."""

    image_size: tuple[Count, Count]
    vae: str  # a folder in the form of diffusers' AutoencoderKL, or a hub id
    vae_stride: Count = 16
    latent_channels: Count = 16
    patch: Count = 1
    shift: Finite = 0.0
    scale: Positive = 0.2325
    kind: Literal["latents"] = "latents"
    vae_sha256: str = ""  # of the VAE's weights, where they are known

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        side = self.vae_stride * self.patch
        return self.image_size[0] // side, self.image_size[1] // side

    @property
    def token_dim(self) -> int:
        """Channels of one token."""
        return self.latent_channels * self.patch**2

    @property
    def token_range(self) -> None:
        """Latents have no fixed range."""
        return None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sides(self.image_size, self.vae_stride * self.patch)


def check_sides(image_size: tuple[int, int], token: int) -> None:
    """Whether whole tokens of `token` pixels a side cover an image.

    Raises:
        ValueError: they do not.
    """
    if any(side % token for side in image_size):
        raise ValueError(f"images of {image_size[0]}x{image_size[1]} pixels: expected multiples of a token's {token}")


Schedule = Literal["linear", "constant"]
Size = Literal["base", "large", "huge"]
IMAGENET_IMAGES = 1_281_167
Order = Literal["random", "raster", "halton", "spread"]


@dataclass(frozen=True)
class Chain(Checked):
    """A teacher's way to draw a token: `steps` of guided ancestral sampling."""

    guidance: Guidance = 1.0  # w; 1 is no guidance
    guidance_schedule: Schedule = "linear"
    steps: int = 100
    temperature: NotNegative = 1.0  # scales the noise added at each step
    clip: bool = False  # keep x_0 within the data's range at each step
    kind: Literal["chain"] = "chain"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.steps <= 1000:
            raise ValueError(f"{self.steps} diffusion steps: expected a number from 2 to 1000")


@dataclass(frozen=True)
class OneStep(Checked):
    """A student's way to draw a token: one call of the head at `timestep` (t*)."""

    timestep: Timestep = 755
    clip: bool = False  # keep x_0 within the data's range, as the teacher's chain does
    guidance: float = 1.0  # the teacher's w that it was distilled with; older models do not say
    guidance_schedule: Schedule = "constant"
    kind: Literal["one_step"] = "one_step"

    def __post_init__(self) -> None:
        super().__post_init__()
        Chain(self.guidance, self.guidance_schedule)  # checks these two


@dataclass(frozen=True)
class ModelConfig(Checked):
    """Everything that a checkpoint's tensors do not say."""

    mar: MARConfig
    space: PixelSpace | LatentSpace
    draw: Chain | OneStep
    class_names: tuple[str, ...]
    iterations: Count  # K, the default number of AR iterations
    name: Name = ""
    data: str = ""  # what it was trained on, as --data takes it
    source: str = ""  # the command that made the weights
    order: Order = "random"  # in which tokens are drawn, unless the caller says otherwise

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.class_names) != self.mar.num_classes:
            raise ValueError(f"{len(self.class_names)} class names: expected {self.mar.num_classes}")
        if self.draw.clip and self.space.kind == "latents":
            raise ValueError("clip=True: latents have no range to keep x_0 in; use clip=False")

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`.

        Raises:
            ValueError: a field is missing, unknown, or of an unknown kind.
        """
        try:
            data = dict(data)
            space = dict(data.pop("space"))
            draw = dict(data.pop("draw"))
            mar = dict(data.pop("mar"))
            space["image_size"] = tuple(space["image_size"])
            mar["token_grid"] = tuple(mar["token_grid"])
            if space["kind"] == "latents":
                draw["clip"] = False  # older checkpoints may say True, which never did anything
            return cls(
                mar=MARConfig(**mar),
                space={"pixels": PixelSpace, "latents": LatentSpace}[space["kind"]](**space),
                draw={"chain": Chain, "one_step": OneStep}[draw["kind"]](**draw),
                class_names=tuple(data.pop("class_names")),
                **data,
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a marval model configuration: {error}") from error


@dataclass(frozen=True)
class RunConfig(Checked):
    """What every training run has."""

    seed: int = 0
    gradient_clip: Positive = 1.0
    accumulate: Count = 1  # parts that a process's rows of a batch are computed in, to save memory
    checkpoint_blocks: bool = False  # recompute the transformer's activations in the backward pass, to save memory
    max_skipped: Count = 10  # updates in a row with gradients that are not finite, before the run stops


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """How a teacher is trained. Training state is saved every `save_every` iterations."""

    iterations: Count = 10_000
    batch_size: Count = 128
    tokens_per_image: Count = 24  # masked tokens of an image that enter the loss
    learning_rate: Positive = 1e-3
    warmup: Whole | None = None  # iterations of linear warm-up; 500, or half of a shorter run, when left out
    decay: Whole = 3000  # iterations of linear decay to 0, at the end
    weight_decay: NotNegative = 0.02  # of the transformer's matrices only, as in MAR
    ema_decay: Decay = 0.9995
    label_drop: Share = 0.1
    mask_ratio_min: Share = 0.0  # MAR: 0.7; low ratios teach the last iterations, which few tokens need
    mask_ratio_std: Positive = 0.6  # MAR: 0.25
    autocast: bool = True  # bf16 for the transformer and the inner layers of the head
    save_every: Count = 250
    log_every: Count = 10

    @property
    def warmup_iterations(self) -> int:
        """The length of the warm-up in this run."""
        return min(500, self.iterations // 2) if self.warmup is None else self.warmup

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_iterations > self.iterations:
            raise ValueError(f"warmup {self.warmup}: expected at most the {self.iterations} iterations of the run")

    @classmethod
    def imagenet256(cls, size: "Size") -> "TrainConfig":
        """MAR's recipe, the same for all sizes: 400 epochs (its released models: 800, `iterations` twice this).

        Batches of 2048 at a constant rate of 1e-4 x batch / 256 after 100 epochs of warm-up, all masked tokens in the
        loss. One thing differs: MAR draws 4 noise levels for each token of a batch (`diffusion_batch_mul`), here it
        is one.
        """
        batch = 2048
        epoch = IMAGENET_IMAGES // batch
        return cls(
            iterations=400 * epoch, batch_size=batch, tokens_per_image=256, learning_rate=1e-4 * batch / 256,
            warmup=100 * epoch, decay=0, weight_decay=0.02, ema_decay=0.9999, label_drop=0.1, mask_ratio_min=0.7,
            mask_ratio_std=0.25, gradient_clip=3.0, checkpoint_blocks=True, save_every=500, log_every=50,
        )  # fmt: skip


def check_warmup(name: str, warmup: int, iterations: int) -> None:
    """Whether a run goes on after its warm-up.

    Raises:
        ValueError: it ends within it.
    """
    if warmup >= iterations:
        raise ValueError(
            f"iterations {iterations}: expected more than the {warmup} of the warm-up ({name}), or a shorter warm-up"
        )


@dataclass(frozen=True)
class DistillConfig(RunConfig):
    """How a student is distilled (GSIM). Where the paper is silent the values are ours, chosen by measurement."""

    iterations: Count = 3000
    objective: Literal["gsim", "sim", "sid", "dmd"] = "sim"
    guidance: Guidance | None = None  # w of the teacher; its own when None
    guidance_schedule: Schedule | None = None  # the teacher's own when None
    timestep: Timestep = 755  # t*, the level at which the student is called
    batch_size: Count = 64
    tokens_per_image: Count = 16
    mask_ratio_min: Share = 0.0
    mask_ratio_std: Positive = 0.6
    learning_rate: Positive = 1e-4  # theta
    auxiliary_learning_rate: Positive = 1e-4  # phi
    auxiliary_steps: Count = 2  # updates of phi for one of theta
    warmup: Whole = 100  # first iterations in which only phi learns
    decay: Whole = 2000  # last iterations in which both learning rates fall to 0
    ema_decay: Decay = 0.998
    autocast: bool = True  # bf16 for the transformers; heads and score arithmetic stay float32
    sample_iterations: Count = 8  # the student's default K
    sample_order: Order = "spread"  # the student's default order: at a small K neighbours must not be drawn at once
    name: Name = "student"
    save_every: Count = 250
    log_every: Count = 10
    probe_every: Count = 250

    def __post_init__(self) -> None:
        super().__post_init__()
        check_warmup("warmup", self.warmup, self.iterations)

    @classmethod
    def imagenet256(cls, size: "Size") -> "DistillConfig":
        """The paper's stage 1: GSIM with lambda = 1 and w = 1.2 for 30 epochs, all masked tokens in the loss.

        Ours, where the paper is silent: batches of 2048, constant w, learning rates (published practice of score
        distillation at this scale: smaller for larger models), one update of phi for one of theta, EMA 0.9999.
        """
        batch = 2048
        rate = {"base": 1e-5, "large": 4e-6, "huge": 2e-6}[size]
        return cls(
            iterations=30 * IMAGENET_IMAGES // batch, objective="gsim", guidance=1.2, guidance_schedule="constant",
            batch_size=batch, tokens_per_image=256, mask_ratio_min=0.7, mask_ratio_std=0.25,
            learning_rate=rate, auxiliary_learning_rate=rate, auxiliary_steps=1, warmup=200, decay=2000,
            ema_decay=0.9999, checkpoint_blocks=True, sample_iterations=64, save_every=500, probe_every=1000,
        )  # fmt: skip

    def within(self, tokens: int) -> "DistillConfig":
        """The same settings with K of at most the number of tokens, of which small images have few."""
        return dataclasses.replace(self, sample_iterations=min(self.sample_iterations, tokens))

    def with_guidance_of(self, teacher: Chain) -> "DistillConfig":
        """The same settings, with the teacher's guidance where none is given."""
        return dataclasses.replace(
            self,
            guidance=teacher.guidance if self.guidance is None else self.guidance,
            guidance_schedule=self.guidance_schedule or teacher.guidance_schedule,
        )


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """How a student is tuned with a reward (MARVAL-RL)."""

    iterations: Count = 200
    sample_iterations: Count = 8  # K
    backprop_iterations: Count = 1  # M, the last iterations that gradients flow through (docs/tuning.md)
    batch_size: Count = 32
    learning_rate: Positive = 5e-6
    hinge: Finite | None = None  # images with a reward above this push no further
    autocast: bool = True  # bf16 for the transformer; head, decoder and rewards stay float32
    normalize: bool = False  # rewards minus their mean, over their deviation, on the untouched student's images
    anchor: NotNegative = 0.0  # weight of the anchor's loss
    anchor_to: Literal["teacher", "student"] = "teacher"  # GSIM to the guided teacher, or to the frozen student's score
    anchor_warmup: Whole = 100  # iterations in which phi alone learns, before the first update
    train: Literal["all", "head", "low-rank"] = "all"
    rank: Count = 8  # of low-rank training
    prompt: Template = "a high-quality and harmonious picture of {}"
    ema_decay: Decay = 0.99
    max_distance_ratio: Limit = 1.10  # stop when the Fréchet distance exceeds this times the student's
    min_diversity_ratio: NotNegative = 0.95  # stop when the diversity falls below this times the student's
    patience: Count = 3  # probes without a better held-out reward before stopping
    name: Name = "tuned"
    save_every: Count = 25
    log_every: Count = 5
    probe_every: Count = 25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backprop_iterations > self.sample_iterations:
            raise ValueError(
                f"backprop_iterations {self.backprop_iterations}: expected at most the {self.sample_iterations} of "
                "sample_iterations"
            )
        if self.anchor:
            check_warmup("anchor_warmup", self.anchor_warmup, self.iterations)

    def within(self, tokens: int) -> "FinetuneConfig":
        """The same settings with K (and M) of at most the number of tokens, of which small images have few."""
        if self.sample_iterations <= tokens:
            return self
        return dataclasses.replace(
            self, sample_iterations=tokens, backprop_iterations=min(self.backprop_iterations, tokens)
        )

    @classmethod
    def imagenet256(cls, size: "Size") -> "FinetuneConfig":
        """The paper's stage 2: 5 epochs of images drawn for ImageNet's classes.

        Ours, where the paper is silent: batches of 256, K = 16 with gradients through the last 4 iterations.
        """
        batch = 256
        rate = {"base": 2e-6, "large": 1e-6, "huge": 5e-7}[size]
        return cls(
            iterations=5 * IMAGENET_IMAGES // batch, sample_iterations=16, backprop_iterations=4, batch_size=batch,
            learning_rate=rate, ema_decay=0.999, checkpoint_blocks=True, save_every=250, probe_every=500,
        )  # fmt: skip
