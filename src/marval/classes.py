"""Classes as people name them, to a model's numbers for them, its labels."""

import difflib
import math
import unicodedata
from collections.abc import Iterable, Sequence
from typing import SupportsIndex

from marval.config import ModelConfig
from marval.runtime.rng import whole_number


def label_names(config: ModelConfig) -> tuple[str, ...]:
    """The name of every label: a class or, of text, a known prompt in one of the styles, as "taxi, 3d style"."""
    if not config.styles:
        return config.class_names
    return tuple(f"{name}, {style} style" for name in config.class_names for style in config.styles)


def seen_labels(config: ModelConfig) -> Sequence[int]:
    """The labels that training images have: all, but for prompts in styles that were held out."""
    every = range(config.mar.num_labels)
    return sorted({*every} - {*config.unseen}) if config.unseen else every


def labels_in_turn(images: Iterable[int], config: ModelConfig) -> list[int]:
    """The labels of some of many images, by their numbers: seen classes take turns, prompts in steps that spread."""
    seen = seen_labels(config)
    count = len(seen)
    steps = range(round(0.618 * count) or 1, 2 * count + 2) if config.encoder else [1]
    step = next(step for step in steps if math.gcd(step, count) == 1)
    return [seen[image * step % count] for image in images]


def class_numbers(classes: Iterable[str | SupportsIndex], names: Sequence[str]) -> list[int]:
    """The numbers of classes, each named, or given as a number of any integer type.

    Raises:
        ValueError: an unknown class; the nearest names are suggested.
    """
    numbers = {as_typed(name): number for number, name in enumerate(names)}
    return [class_number(item, numbers, names) for item in classes]


def class_number(item: str | SupportsIndex, numbers: dict[str, int], names: Sequence[str]) -> int:
    """The number of one class, by the `numbers` of its names as people type them."""
    if isinstance(item, str) and as_typed(item) in numbers:
        return numbers[as_typed(item)]
    try:
        number = int(item) if isinstance(item, str) else whole_number(item)
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number < len(names):
        near = difflib.get_close_matches(str(item), names, n=3, cutoff=0.5) or names[:10]
        known = ", ".join(map(repr, near))
        raise ValueError(f"unknown class {str(item)!r}: expected a number from 0 to {len(names) - 1}, or {known}")
    return number


def listed_class_numbers(texts: Iterable[str], names: Sequence[str]) -> list[int]:
    """The numbers of the classes that texts list: each is one class's name, or names and numbers between commas."""
    items = [item for text in texts for item in ([text] if text in names else text.split(","))]
    return class_numbers(items, names)


def as_typed(name: str) -> str:
    """A name as people type it: without spaces around it, letters with their accents composed (macOS splits them)."""
    return unicodedata.normalize("NFC", name.strip())
