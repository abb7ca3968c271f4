"""A loaded model that draws images: network, token space and the way its tokens are drawn."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL.Image import Image
from torch import Tensor

from marval.classes import class_numbers, label_names
from marval.config import ModelConfig
from marval.io.checkpoint import load_model, save_model
from marval.io.find import find_model
from marval.io.hub import push_model
from marval.io.images import to_pil
from marval.io.text import find_encoder
from marval.io.vae import find_vae
from marval.model import MAR
from marval.runtime.rng import Seeds, image_seeds
from marval.sampling import Orders, check_finite, draw_function, drawing_orders, prepare
from marval.sampling.fast import compile_blocks, few_threads
from marval.sampling.graphs import Graphs
from marval.spaces import Pixels, TokenSpace, token_space
from marval.text import read_prompt, vectors_of

Classes = Iterable[str | SupportsIndex] | Float[Tensor, "b f"]  # names or numbers; prompts, or their vectors
ImageHook = Callable[[int, Float[Tensor, "b c h w"], Bool[Tensor, "b l"]], None]
TokenHook = Callable[[int, Float[Tensor, "b l c"], Bool[Tensor, "b l"]], None]


def load(name: str | Path, device: torch.device | str = "cpu", *, revision: str | None = None) -> "Pipeline":
    """Load a model: a folder, a bundled one by name, or "user/repo" from the Hugging Face hub.

    Args:
        revision: of a hub repository: a branch, tag or commit.

    Raises:
        ValueError: no such model, or damaged files.
    """
    found = find_model(name, revision)
    model, config = load_model(found, device)
    folder = found if found.is_dir() else found.parent
    space, encoder = find_vae(config.space, folder), find_encoder(config.encoder, folder)
    return Pipeline(model, dataclasses.replace(config, space=space, encoder=encoder))


class Pipeline:
    """A teacher or a student with all that it needs to draw images: network, token space, and its way to draw."""

    def __init__(self, model: MAR, config: ModelConfig, space: TokenSpace | None = None):
        self.model, self.config, self.graphs = model, config, Graphs()
        self.space = space or token_space(config.space, self.device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.mask_token.device

    @property
    def default_iterations(self) -> int:
        """K where none is asked for: the model's own, or its number of tokens where that is smaller."""
        return min(self.config.iterations, self.config.mar.num_tokens)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Pipeline":
        """Move the weights and the token space, change the weights' precision, and return the pipeline itself.

        Tokens and noise stay float32. A VAE follows, too.
        """
        self.model.to(device=device, dtype=dtype)
        self.space = self.space.to(self.device, dtype)
        return self

    def compile(self) -> "Pipeline":
        """Compile the network's blocks with `torch.compile` when they are first called, and return the pipeline itself.

        It pays on a GPU that draws much: the first images of a batch size take a minute.
        """
        compile_blocks(self.model)
        self.graphs.forget()
        return self

    def with_draw(self, **settings: Any) -> "Pipeline":
        """The same model with other settings of its draw; None keeps the model's own.

        Args:
            settings: of a teacher `guidance` (w), `guidance_schedule`, `diffusion_steps` (T) and `temperature`; of a
                student `temperature`, and guidance where its head takes w. `ModelConfig.dials` names them.

        Raises:
            ValueError: a setting that this model has not, or a value out of range.
        """
        changes = {name: plain_number(value) for name, value in settings.items() if value is not None}
        if not changes:
            return self
        if other := [name for name in changes if name not in self.config.dials]:
            baked = ", whose guidance is baked in" if "guidance" in other else ""
            raise ValueError(f"{', '.join(other)}: not for a one-step student{baked}")
        draw = dataclasses.replace(self.config.draw, **changes)
        changed = Pipeline(self.model, dataclasses.replace(self.config, draw=draw), self.space)
        changed.graphs = self.graphs
        return changed

    def labels(self, classes: Iterable[str | SupportsIndex]) -> list[int]:
        """Class names or numbers (of any integer type) to numbers; for an unknown one near names are suggested."""
        return class_numbers(classes, label_names(self.config))

    def named(self, asked: str | SupportsIndex, style: str | None = None) -> tuple[int | None, str]:
        """The label of a class or prompt (None: a prompt that the model does not know) and its name; see `given`."""
        if self.config.encoder:
            prompt = read_prompt(asked, self.config, style)
            return prompt.label(self.config), prompt.name(self.config)
        label = int(self.given([asked], style))
        return label, self.config.class_names[label]

    def given(self, classes: Classes, style: str | None = None) -> Int[Tensor, " b"] | Float[Tensor, "b f"]:
        """What the network's `embed` takes of classes: their numbers or, of prompts, their vectors.

        Args:
            style: of prompts that name none themselves ("a taxi, 3-D style"); the model's first when None.

        Raises:
            ValueError: an unknown class or style, or a prompt that the model does not know where no encoder is here.
        """
        if isinstance(classes, Tensor):
            if self.config.encoder and classes.is_floating_point():
                return classes.to(self.model.fake_latent)
            classes = classes.tolist()
        if self.config.encoder:
            return vectors_of([read_prompt(item, self.config, style) for item in classes], self.config, self.model)
        if style is not None:
            raise ValueError(f"style {style[:60]!r}: not for a model of classes")
        return torch.tensor(self.labels(classes), dtype=torch.long)

    def __call__(
        self,
        classes: str | SupportsIndex | Classes,
        *,
        generator: torch.Generator | None = None,
        num_images: int = 1,
        output_type: Literal["pil", "pt"] = "pil",
        **settings: Any,
    ) -> list[Image] | Float[Tensor, "b c h w"]:
        """Draw images in the manner of diffusers' pipelines.

        Args:
            classes: one class or several, each a name or a number; of a model of text, prompts.
            generator: gives every image its seed; without it `seed` counts, as in `sample`.
            num_images: images of each class, which follow each other.
            output_type: "pil" for a list of PIL images, "pt" for the tensor that `sample` returns.
            settings: further arguments of `sample`.

        Raises:
            ValueError: as `sample`; both a generator and a seed.
        """
        if isinstance(classes, str) or not isinstance(classes, Iterable) or getattr(classes, "ndim", 1) == 0:
            classes = [classes]  # type: ignore[list-item]
        wanted: Any = [each for each in classes for _ in range(num_images)]
        if isinstance(classes, Tensor):  # of prompt vectors, perhaps
            wanted = classes.repeat_interleave(num_images, dim=0)
        if generator is not None:
            if "seed" in settings:
                raise ValueError("a generator and a seed: expected one of them")
            drawn = torch.randint(2**62, (len(wanted),), generator=generator, device=generator.device)
            settings["seed"] = drawn.tolist()
        images = self.sample(wanted, **settings)
        return images if output_type == "pt" else [to_pil(image) for image in images]

    def sample(
        self,
        classes: Classes,
        *,
        style: str | None = None,
        seed: Seeds = 0,
        iterations: int | None = None,
        order: Orders | None = None,
        batch_size: int = 64,
        images: Float[Tensor, "b c h w"] | None = None,
        keep: Bool[Tensor, "b l"] | None = None,
        on_iteration: ImageHook | None = None,
        **settings: Any,
    ) -> Float[Tensor, "b c h w"]:
        """Draw one image for each class in `classes` (names or numbers; of a model of text, prompts), on the CPU.

        Values are in [0, 1].

        Args:
            style: of prompts that name none themselves; the model's first when None.
            seed: the first image's seed (the next ones count on from it), or a seed for each image.
            iterations: K; the model's own default when None, or the number of tokens to draw in a batch where that is
                smaller.
            order: "random", "raster", "halton", "spread", positions, or a function of (grid, seed); the model's own
                when None.
            batch_size: images drawn, encoded and decoded at a time; the device never holds more of them.
            images: for inpainting, an image for each class.
            keep: the tokens of `images` that stay as they are.
            on_iteration: called with the iteration, the partial images and the mask of tokens drawn so far.
            settings: of the draw, such as `guidance=1.5` and `temperature=0.9`; see `with_draw`.

        Raises:
            ValueError: an unknown class (see `given`) or setting, K out of range, a bad seed or order, or a model that
                draws values that are not finite.
        """
        given, drawer = self.given(classes, style), self.with_draw(**settings)
        count, tokens = len(given), self.config.mar.num_tokens
        if count < 1 or batch_size < 1:
            raise ValueError(f"{count} classes in batches of {batch_size}: expected at least one of each")
        seeds = image_seeds(seed, count)
        if isinstance(order, Tensor):
            order = drawing_orders(order, self.config.mar.token_grid, seeds)  # a row for each image
        if (images is None) != (keep is None):
            raise ValueError("inpainting needs both `images` and `keep`")
        if images is not None and keep is not None:
            shape = count, self.config.space.channels, *self.config.space.image_size
            if images.shape != shape or keep.shape != (count, tokens) or keep.dtype != torch.bool:
                raise ValueError(
                    f"images {tuple(images.shape)} and a mask {tuple(keep.shape)} of {keep.dtype}: expected images "
                    f"{shape}, one for each class, and a mask {(count, tokens)} of torch.bool, a column for each token"
                )
        drawn = []
        for first in range(0, count, batch_size):
            rows = slice(first, first + batch_size)
            inpainted = None if images is None or keep is None else (images[rows], keep[rows])
            part = order[rows] if isinstance(order, Tensor) else order
            drawn.append(drawer._draw(given[rows], seeds[rows], inpainted, on_iteration, iterations, part))
        return torch.cat(drawn)

    @torch.inference_mode()
    def _draw(
        self,
        given: Tensor,
        seeds: list[int],
        inpainted: tuple[Float[Tensor, "b c h w"], Bool[Tensor, "b l"]] | None,
        on_iteration: ImageHook | None,
        iterations: int | None,
        order: Orders | None,
    ) -> Float[Tensor, "b c h w"]:
        """Draw a batch of `sample`."""
        known = None
        if inpainted is not None:
            images, keep = (x.to(self.device) for x in inpainted)
            if keep.all():
                return images.cpu()
            if iterations is None:
                iterations = min(self.default_iterations, int((~keep).sum(dim=1).max()))
            known = (self.space.encode(images), keep)

        def show(k: int, tokens: Tensor, drawn: Tensor) -> None:
            if on_iteration is not None:
                on_iteration(k, self.decode(tokens).cpu(), drawn.cpu())

        tokens = self.sample_tokens(
            given, seeds=seeds, iterations=iterations, order=order, known=known, on_iteration=on_iteration and show
        )
        drawn = self.decode(tokens)
        check_finite(drawn, image_names(seeds, given))
        space = self.config.space
        if known is not None and space.kind == "pixels":  # the kept tokens' own pixels, which rounding would change
            mask = keep.unflatten(1, space.token_grid)[:, None]
            mask = mask.repeat_interleave(space.patch, 2).repeat_interleave(space.patch, 3)
            drawn = torch.where(mask, images.to(drawn), drawn)
        return drawn.cpu()

    def decode(self, tokens: Float[Tensor, "b l d"]) -> Float[Tensor, "b c h w"]:
        """Tokens to images in [0, 1], as the token space does; on a GPU by a graph of its VAE where that is faster."""
        if isinstance(self.space, Pixels):
            return self.space.decode(tokens)
        return self.graphs.decode(self.space.decode, self.space.vae.parameters(), tokens)

    @torch.inference_mode()
    def sample_tokens(
        self,
        classes: Classes,
        *,
        seeds: Seeds,
        iterations: int | None = None,
        order: Orders | None = None,
        known: tuple[Float[Tensor, "b l c"], Bool[Tensor, "b l"]] | None = None,
        on_iteration: TokenHook | None = None,
    ) -> Float[Tensor, "b l c"]:
        """Draw the tokens of a batch, one image for each class (as `sample` takes them), or for what `given` returns.

        Arguments are those of `sample`, and `known` of `marval.sampling.prepare`; `on_iteration` is given tokens.
        """
        given = self.given(classes)
        seeds, draw = image_seeds(seeds, len(given)), draw_function(self.config, self.device)
        start = prepare(
            self.model, draw, iterations=self.default_iterations if iterations is None else iterations, seeds=seeds,
            orders=self.config.order if order is None else order, known=known,
        )  # fmt: skip
        condition = self.model.embed(given.to(self.device))
        with few_threads(self.config.mar, len(given), self.device):
            for k, (tokens, places) in enumerate(self.graphs.run(self.model, draw, condition, start)):
                if on_iteration is not None:
                    nothing = torch.zeros_like(start.order, dtype=torch.bool)
                    on_iteration(k + 1, tokens, nothing.scatter(1, places, True))
        check_finite(tokens, image_names(seeds, given))
        return tokens

    def save(self, folder: Path | str, dtype: torch.dtype = torch.float32) -> None:
        """Write the model; see `marval.io.checkpoint.save_model`."""
        save_model(folder, self.model, self.config, dtype)

    def push_to_hub(self, repo_id: str, *, private: bool = False, license: str | None = None) -> str:
        """Upload the model with a card to the Hugging Face hub, and return its address; see `marval.io.hub`."""
        return push_model(repo_id, self.model, self.config, private=private, license=license)


def plain_number(value: Any) -> Any:
    """A number of NumPy's as Python's own, which JSON can hold; other values as they are."""
    return value.item() if isinstance(value, np.generic) else value


def image_names(seeds: list[int], given: Tensor) -> list[str]:
    """Name each image for error messages."""
    if given.is_floating_point():
        return [f"seed {seed}" for seed in seeds]
    return [f"seed {seed}, class {label}" for seed, label in zip(seeds, given.tolist(), strict=True)]
