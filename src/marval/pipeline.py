"""A loaded model that draws images: network, token space and the way its tokens are drawn."""

import dataclasses
import difflib
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from marval.config import Chain, ModelConfig, Schedule
from marval.io.checkpoint import WEIGHTS, load_model, save_model
from marval.model import MAR
from marval.sampling import Orders, draw_function, sample
from marval.spaces import TokenSpace, token_space, vae_beside

ImageHook = Callable[[int, Float[Tensor, "b c h w"], Bool[Tensor, "b l"]], None]


def bundled_models() -> dict[str, Path]:
    """The models that ship with the package: name to folder."""
    root = Path(str(files("marval"))) / "assets"
    return {path.parent.name: path.parent for path in sorted(root.glob("*/model.safetensors"))}


def find_model(name: str | Path) -> Path:
    """The folder of a bundled model, or `name` itself where it is a path.

    Raises:
        ValueError: neither; the nearest names are suggested.
    """
    if Path(name).exists():
        in_run = Path(name) / "model"  # a training run's folder
        return in_run if (in_run / WEIGHTS).is_file() else Path(name)
    known = bundled_models()
    if str(name) in known:
        return known[str(name)]
    if str(name).startswith("imagenet256-"):
        raise ValueError(
            f"{str(name)!r} is a recipe, not a model: name a model's folder (marval convert mar makes one), "
            f"then --preset {name}"
        )
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4) or list(known)
    raise ValueError(
        f"no model {str(name)!r}: expected a folder, or a bundled model such as {', '.join(near) or 'none'}"
    )


def load(name: str | Path, device: torch.device | str = "cpu") -> "Pipeline":
    """Load a bundled model by name, or a model folder.

    Raises:
        ValueError: no such model, or damaged files.
    """
    found = find_model(name)
    model, config = load_model(found, device)
    folder = found if found.is_dir() else found.parent
    return Pipeline(model, dataclasses.replace(config, space=vae_beside(config.space, folder)))


class Pipeline:
    """Draws images with a teacher or a student."""

    def __init__(self, model: MAR, config: ModelConfig, space: TokenSpace | None = None):
        self.model, self.config = model, config
        self.space = space or token_space(config.space, self.device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.mask_token.device

    def with_chain(
        self,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        guidance_schedule: Schedule | None = None,
        temperature: float | None = None,
    ) -> "Pipeline":
        """The same teacher with other settings of its chain (see `marval.config.Chain`); None keeps the model's own.

        Raises:
            ValueError: the model is a student, or a value is out of range.
        """
        given: dict[str, Any] = {
            "steps": steps, "guidance": guidance, "guidance_schedule": guidance_schedule, "temperature": temperature,
        }  # fmt: skip
        changes = {name: value for name, value in given.items() if value is not None}
        if not changes:
            return self
        if not isinstance(self.config.draw, Chain):
            raise ValueError(f"{', '.join(changes)}: not for a one-step student, whose guidance is baked in")
        draw = dataclasses.replace(self.config.draw, **changes)
        return Pipeline(self.model, dataclasses.replace(self.config, draw=draw), self.space)

    def labels(self, classes: Sequence[str | int]) -> list[int]:
        """Class names or numbers to numbers.

        Raises:
            ValueError: an unknown class; the nearest names are suggested.
        """
        names = self.config.class_names
        found = []
        for item in classes:
            if isinstance(item, str) and item in names:
                found.append(names.index(item))
            elif str(item).isdecimal() and int(item) < len(names):
                found.append(int(item))
            else:
                near = difflib.get_close_matches(str(item), names, n=3, cutoff=0.5) or names[:10]
                raise ValueError(f"unknown class {str(item)!r}: expected 0 to {len(names) - 1}, or {', '.join(near)}")
        return found

    def sample_tokens(
        self,
        labels: Sequence[int],
        *,
        seeds: Sequence[int],
        iterations: int | None = None,
        order: Orders | None = None,
        batch_size: int = 64,
        known: tuple[Float[Tensor, "b l c"], Bool[Tensor, "b l"]] | None = None,
        on_iteration: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Float[Tensor, "b l c"]:
        """Tokens of one image per label; see `marval.sampling.sample`."""
        draw, parts = draw_function(self.config), []
        order = self.config.order if order is None else order
        with torch.inference_mode():
            for start in range(0, len(labels), batch_size):
                rows = slice(start, start + batch_size)
                parts.append(
                    sample(
                        self.model,
                        draw,
                        torch.tensor(labels[rows], device=self.device),
                        iterations=self.config.iterations if iterations is None else iterations,
                        seeds=seeds[rows],
                        orders=order[rows] if isinstance(order, Tensor) and order.ndim == 2 else order,
                        known=None if known is None else (known[0][rows], known[1][rows]),
                        on_iteration=on_iteration,
                    )
                )
        return torch.cat(parts)

    def sample(
        self,
        classes: Sequence[str | int],
        *,
        seed: int | Sequence[int] = 0,
        iterations: int | None = None,
        order: Orders | None = None,
        batch_size: int = 64,
        images: Float[Tensor, "b c h w"] | None = None,
        keep: Bool[Tensor, "b l"] | None = None,
        on_iteration: ImageHook | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """One image per class in `classes` (names or numbers), in [0, 1], on the CPU.

        Args:
            seed: the first image's seed (the next ones count on from it), or a seed for each image.
            iterations: K; the model's own default when None, or the number of tokens to draw where that is smaller.
            order: "random", "raster", "halton", "spread", positions, or a function of (grid, seed); the model's own
                when None.
            images, keep: inpainting: the tokens of `images` where `keep` is True stay as they are.
            on_iteration: called with the iteration, the partial images and the mask of tokens drawn so far.

        Raises:
            ValueError: an unknown class, K out of range, or a bad order.
        """
        labels = self.labels(classes)
        if not labels or batch_size < 1:
            raise ValueError(f"{len(labels)} classes in batches of {batch_size}: expected at least one of each")
        if (images is None) != (keep is None):
            raise ValueError("inpainting needs both `images` and `keep`")
        seeds = list(range(seed, seed + len(labels))) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(labels):
            raise ValueError(f"{len(seeds)} seeds for {len(labels)} images: expected one for each, or a single number")
        known = None
        if images is not None and keep is not None:
            known = (self.space.encode(images.to(self.device)), keep)
            hidden = int((~keep).sum(dim=1).max())
            if hidden == 0:
                return images.cpu().clone()
            iterations = min(self.config.iterations, hidden) if iterations is None else iterations

        def show(k: int, tokens: Tensor, drawn: Tensor) -> None:
            if on_iteration is not None:
                on_iteration(k, self.space.decode(tokens).cpu(), drawn.cpu())

        tokens = self.sample_tokens(
            labels, seeds=seeds, iterations=iterations, order=order, batch_size=batch_size, known=known,
            on_iteration=None if on_iteration is None else show,
        )  # fmt: skip
        with torch.inference_mode():
            drawn = self.space.decode(tokens)
            if images is not None and keep is not None:
                drawn = restore_known(drawn, images.to(drawn), keep.to(drawn.device), self.config)
        return drawn.cpu().clone()

    def save(self, folder: Path | str, dtype: torch.dtype = torch.float32) -> None:
        """Write the model; see `marval.io.checkpoint.save_model`."""
        save_model(folder, self.model, self.config, dtype)


def restore_known(
    drawn: Float[Tensor, "b c h w"],
    images: Float[Tensor, "b c h w"],
    keep: Bool[Tensor, "b l"],
    config: ModelConfig,
) -> Float[Tensor, "b c h w"]:
    """Put the kept tokens' own pixels back, so that rounding does not change them (pixel patches only)."""
    if config.space.kind != "pixels":
        return drawn
    mask = keep.unflatten(1, config.space.token_grid)[:, None]
    patch = config.space.patch
    return torch.where(mask.repeat_interleave(patch, 2).repeat_interleave(patch, 3), images, drawn)
