"""A loaded model that draws images: network, token space and the way its tokens are drawn."""

import dataclasses
import difflib
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from marval.config import Chain, ModelConfig, Schedule
from marval.io.checkpoint import WEIGHTS, load_model, save_model
from marval.io.hub import HUB_ID, fetch_model, push_model
from marval.io.vae import vae_beside
from marval.model import MAR
from marval.runtime.rng import Seeds, image_seeds, whole_number
from marval.sampling import Orders, check_finite, draw_function, drawing_orders, sample
from marval.sampling.fast import few_threads
from marval.spaces import TokenSpace, token_space

ImageHook = Callable[[int, Float[Tensor, "b c h w"], Bool[Tensor, "b l"]], None]


def bundled_models() -> dict[str, Path]:
    """The models that ship with the package: name to folder."""
    root = Path(str(files("marval"))) / "assets"
    return {path.parent.name: path.parent for path in sorted(root.glob("*/model.safetensors"))}


def find_model(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a model that a person named: a path, a bundled model, or "user/repo" on the Hugging Face hub.

    Raises:
        ValueError: none of these; the nearest names are suggested.
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
    missing = f"no model {str(name)!r}: expected a folder, or a bundled model such as {', '.join(near) or 'none'}"
    if HUB_ID.fullmatch(str(name)) and not Path(name).parent.is_dir():  # runs/student is a path where runs/ is here
        try:
            return fetch_model(str(name), revision)
        except ValueError as error:
            raise ValueError(f"{missing}; {error}") from error
    raise ValueError(missing)


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

    @property
    def default_iterations(self) -> int:
        """K where none is asked for: the model's own, or its number of tokens where that is smaller."""
        return min(self.config.iterations, self.config.mar.num_tokens)

    def with_chain(
        self,
        *,
        diffusion_steps: int | None = None,
        guidance: float | None = None,
        guidance_schedule: Schedule | None = None,
        temperature: float | None = None,
    ) -> "Pipeline":
        """The same teacher with other settings of its chain (see `marval.config.Chain`); None keeps the model's own.

        Raises:
            ValueError: the model is a student, or a value is out of range.
        """
        given: dict[str, Any] = {
            "diffusion_steps": diffusion_steps, "guidance": guidance, "guidance_schedule": guidance_schedule,
            "temperature": temperature,
        }  # fmt: skip
        changes = {name: value for name, value in given.items() if value is not None}
        if not changes:
            return self
        if not isinstance(self.config.draw, Chain):
            raise ValueError(f"{', '.join(changes)}: not for a one-step student, whose guidance is baked in")
        draw = dataclasses.replace(self.config.draw, **changes)
        return Pipeline(self.model, dataclasses.replace(self.config, draw=draw), self.space)

    def labels(self, classes: Iterable[str | SupportsIndex]) -> list[int]:
        """Class names or numbers (of any integer type) to numbers.

        Raises:
            ValueError: an unknown class; the nearest names are suggested.
        """
        names = self.config.class_names
        numbers = {name: number for number, name in enumerate(names)}
        composed = {normalized(name): number for name, number in reversed(numbers.items())}
        found = []
        for item in classes:
            text = str(item)
            try:
                number = int(item) if isinstance(item, str) and item.strip().isdecimal() else whole_number(item)
            except TypeError:
                number = -1
            if isinstance(item, str) and (item in numbers or normalized(item) in composed):
                found.append(numbers.get(item, composed.get(normalized(item), 0)))
            elif 0 <= number < len(names):
                found.append(number)
            else:
                near = difflib.get_close_matches(text, names, n=3, cutoff=0.5) or names[:10]
                known = ", ".join(repr(name) for name in near)
                raise ValueError(f"unknown class {text!r}: expected a number from 0 to {len(names) - 1}, or {known}")
        return found

    def listed_labels(self, texts: Sequence[str]) -> list[int]:
        """The classes that texts name: each a class's name, whatever it holds, or names and numbers between commas.

        Raises:
            ValueError: as `labels`.
        """
        known = {normalized(name) for name in self.config.class_names}
        found: list[int] = []
        for text in texts:
            parts = [text] if text in self.config.class_names else text.split(",")
            while parts:  # the most parts that are one name, as names may hold commas
                count = next((n for n in range(len(parts), 1, -1) if normalized(",".join(parts[:n])) in known), 1)
                found += self.labels([",".join(parts[:count])])
                parts = parts[count:]
        return found

    def sample_tokens(
        self,
        labels: Iterable[SupportsIndex],
        *,
        seeds: Seeds,
        iterations: int | None = None,
        order: Orders | None = None,
        batch_size: int = 64,
        known: tuple[Float[Tensor, "b l c"], Bool[Tensor, "b l"]] | None = None,
        on_iteration: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Float[Tensor, "b l c"]:
        """Tokens of one image per label; see `marval.sampling.sample`."""
        labels = self.labels(labels)
        seeds, order = image_seeds(seeds, len(labels)), self._order(order, len(labels))
        draw, parts, mar = draw_function(self.config), [], self.config.mar
        numbers = min(len(labels), batch_size) * (mar.buffer_size + mar.num_tokens) * mar.decoder_dim
        with torch.inference_mode(), few_threads(numbers, self.device):
            for rows in batches(len(labels), batch_size):
                parts.append(
                    sample(
                        self.model,
                        draw,
                        torch.tensor(labels[rows], device=self.device),
                        iterations=self.default_iterations if iterations is None else iterations,
                        seeds=seeds[rows],
                        orders=order[rows] if isinstance(order, Tensor) else order,
                        known=None if known is None else (known[0][rows], known[1][rows]),
                        on_iteration=on_iteration,
                    )
                )
        return torch.cat(parts)

    def sample(
        self,
        classes: Iterable[str | SupportsIndex],
        *,
        seed: Seeds = 0,
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
            batch_size: images drawn, encoded and decoded at a time; the device never holds more of them.
            images, keep: inpainting: the tokens of `images` where `keep` is True stay as they are.
            on_iteration: called with the iteration, the partial images and the mask of tokens drawn so far.

        Raises:
            ValueError: an unknown class, K out of range, a bad seed or order, or a model that draws values that are
                not finite.
        """
        drawn = self.sample_batches(
            classes, seed=seed, iterations=iterations, order=order, batch_size=batch_size, images=images, keep=keep,
            on_iteration=on_iteration,
        )  # fmt: skip
        return torch.cat(list(drawn))

    def sample_batches(
        self,
        classes: Iterable[str | SupportsIndex],
        *,
        seed: Seeds = 0,
        iterations: int | None = None,
        order: Orders | None = None,
        batch_size: int = 64,
        images: Float[Tensor, "b c h w"] | None = None,
        keep: Bool[Tensor, "b l"] | None = None,
        on_iteration: ImageHook | None = None,
    ) -> Iterator[Float[Tensor, "b c h w"]]:
        """The images of `sample`, a batch at a time, to save each before the next is drawn.

        Raises:
            ValueError: as `sample`; what is asked for is checked at once, before the first batch is.
        """
        labels = self.labels(classes)
        every = batches(len(labels), batch_size)
        if (images is None) != (keep is None):
            raise ValueError("inpainting needs both `images` and `keep`")
        seeds, order = image_seeds(seed, len(labels)), self._order(order, len(labels))
        if images is not None and keep is not None:
            if len(images) != len(labels) or keep.shape != (len(labels), self.config.mar.num_tokens):
                raise ValueError(
                    f"{len(images)} images and a mask of shape {tuple(keep.shape)} for {len(labels)} classes of "
                    f"{self.config.mar.num_tokens} tokens: expected an image and a row of the mask for each class"
                )
            hidden = int((~keep).sum(dim=1).max())
            iterations = min(self.default_iterations, hidden) if iterations is None else iterations

        def draw(rows: slice) -> Tensor:
            return self._draw(
                labels[rows], seeds[rows], iterations, order[rows] if isinstance(order, Tensor) else order,
                None if images is None or keep is None else (images[rows], keep[rows]), on_iteration,
            ).clone()  # fmt: skip

        return map(draw, every)

    @torch.inference_mode()
    def _draw(
        self,
        labels: list[int],
        seeds: list[int],
        iterations: int | None,
        order: Orders | None,
        kept: tuple[Float[Tensor, "b c h w"], Bool[Tensor, "b l"]] | None,
        on_iteration: ImageHook | None,
    ) -> Float[Tensor, "b c h w"]:
        """One batch of `sample`; `kept` are the images and the mask of inpainting."""
        known = None
        if kept is not None:
            images, keep = kept[0].to(self.device), kept[1].to(self.device)
            if keep.all():
                return images.cpu()
            known = (self.space.encode(images), keep)

        def show(k: int, tokens: Tensor, drawn: Tensor) -> None:
            if on_iteration is not None:
                check_finite(tokens, seeds, labels)
                on_iteration(k, self.space.decode(tokens).cpu(), drawn.cpu())

        tokens = self.sample_tokens(
            labels, seeds=seeds, iterations=iterations, order=order, batch_size=len(labels), known=known,
            on_iteration=None if on_iteration is None else show,
        )  # fmt: skip
        drawn = self.space.decode(tokens)
        check_finite(drawn, seeds, labels)
        return (drawn if kept is None else restore_known(drawn, images.to(drawn), keep, self.config)).cpu()

    def _order(self, order: Orders | None, count: int) -> Orders:
        """The order to draw in; positions as a row for each of `count` images, on the CPU."""
        order = self.config.order if order is None else order
        if isinstance(order, Tensor):
            return drawing_orders(order, self.config.mar.token_grid, range(count))
        return order

    def save(self, folder: Path | str, dtype: torch.dtype = torch.float32) -> None:
        """Write the model; see `marval.io.checkpoint.save_model`."""
        save_model(folder, self.model, self.config, dtype)

    def push_to_hub(self, repo_id: str, *, private: bool = False, license: str | None = None) -> str:
        """Upload the model with a card to the Hugging Face hub, and return its address; see `marval.io.hub`."""
        return push_model(repo_id, self.model, self.config, private=private, license=license)


def normalized(name: str) -> str:
    """A class's name as people type it: without spaces around it, letters with their accents composed."""
    return unicodedata.normalize("NFC", name.strip())


def batches(count: int, size: int) -> list[slice]:
    """The rows of each batch of `count` rows.

    Raises:
        ValueError: no rows, or batches of none.
    """
    if count < 1 or size < 1:
        raise ValueError(f"{count} classes in batches of {size}: expected at least one of each")
    return [slice(start, start + size) for start in range(0, count, size)]


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
