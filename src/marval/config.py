"""Configurations: frozen dataclasses, and their JSON form. Imports no torch.

A field's annotation carries its rule; every configuration checks its fields where it is made.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from marval.checks import Checked, Rule


def is_plain_name(name: str) -> bool:
    """Tell whether a model's name can be part of a file's name: no path, nothing hidden, nothing invisible."""
    return name.isprintable() and not {"/", "\\"} & set(name) and not name.startswith(".") and len(name) <= 100


Schedule = Literal["linear", "constant"]
Size = Literal["base", "large", "huge"]
Order = Literal["random", "raster", "halton", "spread"]
Dtype = Literal["float32", "bfloat16"]
Weighting = Literal["eps", "v"]  # of noise levels in a teacher's loss
Objective = Literal["gsim", "sim", "sid"]
Count = Annotated[int, Rule("a whole number from 1", lambda x: x >= 1)]
Counts = Annotated[tuple[Count, ...], Rule("one or more whole numbers from 1", lambda x: len(x) > 0)]
Pairs = Annotated[int, Rule("a whole number from 2", lambda x: x >= 2)]
Whole = Annotated[int, Rule("a whole number from 0", lambda x: x >= 0)]
Finite = Annotated[float, Rule("a finite number", lambda x: -math.inf < x < math.inf)]
Positive = Annotated[float, Rule("a finite number above 0", lambda x: 0 < x < math.inf)]
NotNegative = Annotated[float, Rule("a finite number from 0", lambda x: 0 <= x < math.inf)]
Limit = Annotated[float, Rule("a number above 0 (inf: no limit)", lambda x: x > 0)]
Share = Annotated[float, Rule("a number from 0 to 1", lambda x: 0 <= x <= 1)]
Decay = Annotated[float, Rule("a number from 0 to below 1", lambda x: 0 <= x < 1)]
Guidance = Annotated[float, Rule("a number from 0, where 1 is no guidance", lambda x: 0 <= x < math.inf)]
GuidanceRange = Annotated[
    tuple[Guidance, Guidance], Rule("two numbers, the lowest w above 0 and the highest", lambda x: 0 < x[0] < x[1])
]
Steps = Annotated[int, Rule("a whole number from 2 to 1000", lambda x: 2 <= x <= 1000)]
Timestep = Annotated[int, Rule("a number from 0 to 998 (1/alpha explodes at 999)", lambda x: 0 <= x < 999)]
Name = Annotated[str, Rule("a plain name: at most 100 characters, no / or \\, no dot in front", is_plain_name)]
Template = Annotated[
    str, Rule("exactly one {} and no other braces", lambda x: x.count("{}") == x.count("{") == x.count("}") == 1)
]


@dataclass(frozen=True)
class MARConfig(Checked):
    """Sizes of the context network and the token head."""

    token_grid: tuple[Count, Count]  # rows, columns
    token_dim: Count  # channels C of one token
    num_classes: Count  # or, where text is the condition, known prompts
    encoder_dim: Count
    encoder_depth: Whole
    encoder_heads: Count
    decoder_dim: Count
    decoder_depth: Count  # the last block is computed at the drawn tokens alone
    decoder_heads: Count
    head_width: Count
    head_depth: Whole
    buffer_size: Whole = 64
    mlp_ratio: Positive = 4.0
    learn_variance: bool = True
    dropout: Decay = 0.0  # in training only
    guidance_range: GuidanceRange | None = None  # w that the head takes as an input (a student's); None: it takes none
    cached: bool = False  # the context network reads every token once, block-causally (a student's)
    joint_draw: bool = False  # mask tokens read the noise of tokens drawn together, which then agree (a student's)
    text_dim: Whole = 0  # numbers of a sentence's embedding, where text is the condition; 0: classes are
    num_styles: Whole = 0  # of text

    def __post_init__(self) -> None:
        super().__post_init__()
        for width, heads in ((self.encoder_dim, self.encoder_heads), (self.decoder_dim, self.decoder_heads)):
            if width % heads:
                raise ValueError(f"{heads} attention heads for {width} channels: expected a number that divides them")

    @property
    def num_tokens(self) -> int:
        """L, the number of tokens of an image."""
        return math.prod(self.token_grid)

    @property
    def labels_per_class(self) -> int:
        """1, or a label for each style of a known prompt; those of the first prompt come first."""
        return max(1, self.num_styles)

    @property
    def num_labels(self) -> int:
        """How many labels there are: classes, or known prompts in every style."""
        return self.num_classes * self.labels_per_class

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
    def imagenet256(cls, size: Size) -> "MARConfig":
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
    vae: str  # a folder in the form of diffusers' AutoencoderKL, a bundled one's name, or a hub id
    vae_stride: Count = 16
    latent_channels: Count = 16
    patch: Count = 1
    shift: Finite = 0.0
    scale: Positive = 0.2325
    kind: Literal["latents"] = "latents"
    vae_sha256: str = ""  # of the VAE's weights, where they are known
    limit: NotNegative = 0.0  # how far tokens are from 0, at most, in the training data; 0: not known

    channels = 3  # of its pictures

    @property
    def token_range(self) -> tuple[float, float] | None:
        """The range of tokens, where it is known."""
        return (-self.limit, self.limit) if self.limit else None

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        side = self.vae_stride * self.patch
        return self.image_size[0] // side, self.image_size[1] // side

    @property
    def token_dim(self) -> int:
        """Channels of one token."""
        return self.latent_channels * self.patch**2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sides(self.image_size, self.vae_stride * self.patch)


def check_sides(image_size: tuple[int, int], token: int) -> None:
    """Check that whole tokens of `token` pixels a side cover an image."""
    if any(side % token for side in image_size):
        raise ValueError(f"images of {image_size[0]}x{image_size[1]} pixels: expected multiples of a token's {token}")


@dataclass(frozen=True)
class Chain(Checked):
    """A teacher's way to draw a token: `diffusion_steps` of guided ancestral sampling."""

    guidance: Guidance = 1.0  # w; 1 is no guidance
    guidance_schedule: Schedule = "linear"
    diffusion_steps: Steps = 100  # T
    temperature: NotNegative = 1.0  # scales the noise added at each step
    clip: bool = False  # keep x_0 within the data's range at each step
    kind: Literal["chain"] = "chain"


@dataclass(frozen=True)
class OneStep(Checked):
    """A student's way to draw a token: one call of the head at `timestep` (t*)."""

    timestep: Timestep = 755
    clip: bool = False  # keep x_0 within the data's range, as the teacher's chain does
    guidance: Guidance = 1.0  # w, where the head takes it; else the one that is baked in (older models do not say)
    guidance_schedule: Schedule = "constant"
    temperature: NotNegative = 1.0  # scales the noise that a token starts from
    kind: Literal["one_step"] = "one_step"


@dataclass(frozen=True)
class ModelConfig(Checked):
    """Everything that a checkpoint's tensors do not say."""

    mar: MARConfig
    space: PixelSpace | LatentSpace
    draw: Chain | OneStep
    class_names: tuple[str, ...]  # of a model of text: the prompts that it knows
    iterations: Count  # K, the default number of AR iterations
    name: Name = ""
    data: str = ""  # what it was trained on, as --data takes it
    source: str = ""  # the command that made the weights
    order: Order = "random"  # in which tokens are drawn, unless the caller says otherwise
    encoder: str = ""  # the sentence encoder of a model of text (see `marval.io.text`)
    styles: tuple[str, ...] = ()  # that a prompt can ask for
    unseen: tuple[Whole, ...] = ()  # labels of text that no training image has, such as held-out pairs

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.class_names) != self.mar.num_classes:
            raise ValueError(f"{len(self.class_names)} class names: expected {self.mar.num_classes}")
        if (bool(self.encoder), len(self.styles)) != (bool(self.mar.text_dim), self.mar.num_styles):
            raise ValueError(f"encoder {self.encoder!r} and {len(self.styles)} styles: expected those of the network")
        if self.mar.joint_draw and isinstance(self.draw, Chain):
            raise ValueError("joint_draw=True: a chain draws each token alone; expected a one-step student")
        if self.draw.clip and self.space.token_range is None:
            raise ValueError("clip=True: latents without a limit have no range to keep x_0 in; use clip=False")
        low, high = self.mar.guidance_range or (0.0, math.inf)
        if not low <= self.draw.guidance <= high:
            raise ValueError(
                f"guidance {self.draw.guidance:g}: expected a number from {low:g} to {high:g}, the range of {self.name}"
            )

    @property
    def dials(self) -> tuple[str, ...]:
        """The settings of the draw that can be chosen when images are drawn."""
        guidance = isinstance(self.draw, Chain) or self.mar.guidance_range is not None
        steps = ("diffusion_steps",) if isinstance(self.draw, Chain) else ()
        return (*(("guidance", "guidance_schedule") if guidance else ()), *steps, "temperature")

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`, of older checkpoints too; a field that is missing or unknown is a ValueError."""
        try:
            mar, space, draw = dict(data["mar"]), dict(data["space"]), dict(data["draw"])
            mar["token_grid"], space["image_size"] = tuple(mar["token_grid"]), tuple(space["image_size"])
            if mar.get("guidance_range"):
                mar["guidance_range"] = tuple(mar["guidance_range"])
            if "steps" in draw:  # the older name
                draw["diffusion_steps"] = draw.pop("steps")
            if space["kind"] == "latents" and not space.get("limit"):
                draw["clip"] = False  # older checkpoints may say True, which never did anything
            parts = {
                "mar": MARConfig(**mar),
                "space": {"pixels": PixelSpace, "latents": LatentSpace}[space["kind"]](**space),
                "draw": {"chain": Chain, "one_step": OneStep}[draw["kind"]](**draw),
                "class_names": tuple(data["class_names"]),
                "styles": tuple(data.get("styles", ())),
                "unseen": tuple(data.get("unseen", ())),
            }
            return cls(**data | parts)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a marval model configuration: {error}") from error
