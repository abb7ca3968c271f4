"""Classes as people name them, to a model's numbers for them."""

import difflib
import unicodedata
from collections.abc import Iterable, Sequence
from typing import SupportsIndex

from marval.runtime.rng import whole_number


def class_numbers(classes: Iterable[str | SupportsIndex], names: Sequence[str]) -> list[int]:
    """The numbers of classes, each named, or given as a number of any integer type.

    Raises:
        ValueError: an unknown class; the nearest names are suggested.
    """
    exact = {name: number for number, name in enumerate(names)}
    typed = {as_typed(name): number for name, number in reversed(exact.items())}
    numbers = []
    for item in classes:
        number = exact.get(item, typed.get(as_typed(item))) if isinstance(item, str) else None
        if number is None:
            number = _number(item)
        if not 0 <= number < len(names):
            near = difflib.get_close_matches(str(item), names, n=3, cutoff=0.5) or names[:10]
            known = ", ".join(repr(name) for name in near)
            raise ValueError(f"unknown class {str(item)!r}: expected a number from 0 to {len(names) - 1}, or {known}")
        numbers.append(number)
    return numbers


def listed_class_numbers(texts: Iterable[str], names: Sequence[str]) -> list[int]:
    """The numbers of the classes that texts list: each is one class's name, or names and numbers between commas.

    Raises:
        ValueError: as `class_numbers`.
    """
    known = {as_typed(name) for name in names}
    numbers: list[int] = []
    for text in texts:
        parts = [text] if text in names else text.split(",")
        while parts:  # the most parts that are one name, as names may hold commas
            count = next((n for n in range(len(parts), 1, -1) if as_typed(",".join(parts[:n])) in known), 1)
            numbers += class_numbers([",".join(parts[:count])], names)
            parts = parts[count:]
    return numbers


def as_typed(name: str) -> str:
    """A name as people type it: without spaces around it, letters with their accents composed."""
    return unicodedata.normalize("NFC", name.strip())


def _number(item: str | SupportsIndex) -> int:
    """Read an item as a number; -1 where it is none."""
    if isinstance(item, str):
        return int(item) if item.strip().isdecimal() else -1
    try:
        return whole_number(item)
    except TypeError:
        return -1
