"""Configurations: frozen dataclasses, their JSON form and the presets. Imports no torch."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class MARConfig:
    """Sizes of the context network and the token head."""

    token_grid: tuple[int, int]  # rows, columns
    token_dim: int  # channels C of one token
    num_classes: int
    encoder_dim: int
    encoder_depth: int
    encoder_heads: int
    decoder_dim: int
    decoder_depth: int
    decoder_heads: int
    head_width: int
    head_depth: int
    buffer_size: int = 64
    mlp_ratio: float = 4.0
    learn_variance: bool = True
    dropout: float = 0.0  # in training only

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
class PixelSpace:
    """Tokens are `patch` x `patch` pixel patches: `(image - shift) * scale`, images in [0, 1]."""

    image_size: tuple[int, int]  # rows, columns
    channels: int
    patch: int
    shift: float
    scale: float
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


@dataclass(frozen=True)
class LatentSpace:
    """Tokens are `patch` x `patch` patches of a VAE's latent: `(latent - shift) * scale`."""

    image_size: tuple[int, int]
    vae: str  # a folder in the form of diffusers' AutoencoderKL, or a hub id
    vae_stride: int = 16
    latent_channels: int = 16
    patch: int = 1
    shift: float = 0.0
    scale: float = 0.2325
    kind: Literal["latents"] = "latents"

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


Schedule = Literal["linear", "constant"]
Size = Literal["base", "large", "huge"]
IMAGENET_IMAGES = 1_281_167
Order = Literal["random", "raster", "halton", "spread"]


@dataclass(frozen=True)
class Chain:
    """A teacher's way to draw a token: `steps` of guided ancestral sampling."""

    guidance: float = 1.0  # w; 1 is no guidance
    guidance_schedule: Schedule = "linear"
    steps: int = 100
    temperature: float = 1.0  # scales the noise added at each step
    clip: bool = False  # keep x_0 within the data's range at each step
    kind: Literal["chain"] = "chain"

    def __post_init__(self) -> None:
        if not 2 <= self.steps <= 1000:
            raise ValueError(f"{self.steps} diffusion steps: expected a number from 2 to 1000")
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance {self.guidance}: expected a number from 0, where 1 is no guidance")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature {self.temperature}: expected a number from 0")
        if self.guidance_schedule not in ("linear", "constant"):
            raise ValueError(f"guidance schedule {self.guidance_schedule!r}: expected linear or constant")


@dataclass(frozen=True)
class OneStep:
    """A student's way to draw a token: one call of the head at `timestep` (t*)."""

    timestep: int = 755
    clip: bool = False  # keep x_0 within the data's range, as the teacher's chain does
    guidance: float = 1.0  # the teacher's w that it was distilled with; older models do not say
    guidance_schedule: Schedule = "constant"
    kind: Literal["one_step"] = "one_step"

    def __post_init__(self) -> None:
        if not 0 <= self.timestep < 999:
            raise ValueError(f"timestep {self.timestep}: expected a number from 0 to 998 (1/alpha explodes at 999)")
        Chain(self.guidance, self.guidance_schedule)  # checks these two


@dataclass(frozen=True)
class ModelConfig:
    """Everything that a checkpoint's tensors do not say."""

    mar: MARConfig
    space: PixelSpace | LatentSpace
    draw: Chain | OneStep
    class_names: tuple[str, ...]
    iterations: int  # K, the default number of AR iterations
    name: str = ""
    data: str = ""  # what it was trained on, as --data takes it
    source: str = ""  # the command that made the weights
    order: Order = "random"  # in which tokens are drawn, unless the caller says otherwise

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
class RunConfig:
    """What every training run has."""

    seed: int = 0
    gradient_clip: float = 1.0
    accumulate: int = 1  # parts that a process's rows of a batch are computed in, to save memory
    checkpoint_blocks: bool = False  # recompute the transformer's activations in the backward pass, to save memory
    max_skipped: int = 10  # updates in a row with gradients that are not finite, before the run stops


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """How a teacher is trained. Training state is saved every `save_every` iterations."""

    iterations: int = 10_000
    batch_size: int = 128
    tokens_per_image: int = 24  # masked tokens of an image that enter the loss
    learning_rate: float = 1e-3
    warmup: int = 500  # iterations of linear warm-up
    decay: int = 3000  # iterations of linear decay to 0, at the end
    weight_decay: float = 0.02  # of the transformer's matrices only, as in MAR
    ema_decay: float = 0.9995
    label_drop: float = 0.1
    mask_ratio_min: float = 0.0  # MAR: 0.7; low ratios teach the last iterations, which few tokens need
    mask_ratio_std: float = 0.6  # MAR: 0.25
    autocast: bool = True  # bf16 for the transformer and the inner layers of the head
    save_every: int = 250
    log_every: int = 10

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


@dataclass(frozen=True)
class DistillConfig(RunConfig):
    """How a student is distilled (GSIM). Where the paper is silent the values are ours, chosen by measurement."""

    iterations: int = 3000
    objective: Literal["gsim", "sim", "sid", "dmd"] = "sim"
    guidance: float | None = None  # w of the teacher; its own when None
    guidance_schedule: Schedule | None = None  # the teacher's own when None
    timestep: int = 755  # t*, the level at which the student is called
    batch_size: int = 64
    tokens_per_image: int = 16
    mask_ratio_min: float = 0.0
    mask_ratio_std: float = 0.6
    learning_rate: float = 1e-4  # theta
    auxiliary_learning_rate: float = 1e-4  # phi
    auxiliary_steps: int = 2  # updates of phi for one of theta
    warmup: int = 100  # first iterations in which only phi learns
    decay: int = 2000  # last iterations in which both learning rates fall to 0
    ema_decay: float = 0.998
    autocast: bool = True  # bf16 for the transformers; heads and score arithmetic stay float32
    sample_iterations: int = 8  # the student's default K
    sample_order: Order = "spread"  # the student's default order: at a small K neighbours must not be drawn at once
    name: str = "student"
    save_every: int = 250
    log_every: int = 10
    probe_every: int = 250

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

    iterations: int = 200
    sample_iterations: int = 8  # K
    backprop_iterations: int = 1  # M, the last iterations that gradients flow through (docs/study-rl.md)
    batch_size: int = 32
    learning_rate: float = 5e-6
    hinge: float | None = None  # images with a reward above this push no further
    autocast: bool = True  # bf16 for the transformer; head, decoder and rewards stay float32
    normalize: bool = False  # rewards minus their mean, over their deviation, on the untouched student's images
    anchor: float = 0.0  # weight of the anchor's loss
    anchor_to: Literal["teacher", "student"] = "teacher"  # GSIM to the guided teacher, or to the frozen student's score
    anchor_warmup: int = 100  # iterations in which phi alone learns, before the first update
    train: Literal["all", "head", "low-rank"] = "all"
    rank: int = 8  # of low-rank training
    prompt: str = "a high-quality and harmonious picture of {}"
    ema_decay: float = 0.99
    max_distance_ratio: float = 1.10  # stop when the Fréchet distance exceeds this times the student's
    min_diversity_ratio: float = 0.95  # stop when the diversity falls below this times the student's
    patience: int = 3  # probes without a better held-out reward before stopping
    name: str = "tuned"
    save_every: int = 25
    log_every: int = 5
    probe_every: int = 25

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
