"""Dataclasses that check their fields, by the rules in their annotations, when they are made. Imports no torch."""

from collections.abc import Callable
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints


class Rule(NamedTuple):
    """What a field's value must be, in words and as a test; NaN fails each of them."""

    expected: str
    holds: Callable[[Any], bool]


def fits(value: object, kind: Any) -> bool:
    """Tell whether a value is of a field's type and keeps its rules. Whole numbers must fit into 64 bits."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return fits(value, parts[0]) and parts[1].holds(value)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is tuple:
        parts = parts[:1] * len(value) if isinstance(value, tuple) and parts[-1] is ... else parts
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(fits, value, parts))
    if kind in (int, float):  # a bool is no number here
        number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
        return number and (not isinstance(value, Integral) or abs(int(value)) < 2**63)
    return isinstance(value, kind)


def wanted(kind: Any) -> str:
    """Say in words what `fits` asks of a value."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return parts[1].expected
    if origin in (Union, UnionType):
        return " or ".join(wanted(part) for part in parts if part is not NoneType)
    if origin is Literal:
        return " or ".join(map(str, parts))
    if origin is tuple:
        return f"a list, each {wanted(parts[0])}"
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    return words.get(kind) or f"a {kind.__name__}"


def check(name: str, value: object, kind: Any) -> None:
    """Refuse a value that is not of the type `kind` or breaks a rule of it."""
    if not fits(value, kind):
        raise ValueError(f"{name} {shorten(value)}: expected {wanted(kind)}")


def shorten(value: object) -> str:
    """Quote a value for a message, in at most 60 characters."""
    return repr(value)[:60]


class Checked:
    """A dataclass that refuses a field of another type, or one that breaks its rule, when it is made."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self), include_extras=True).items():
            check(name, getattr(self, name), kind)
