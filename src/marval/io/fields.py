"""Values that came from a file, checked against the types that a dataclass declares."""

import dataclasses
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check_fields(record: Any) -> None:
    """Check a dataclass's values, nested ones too: numbers must be finite, and whole numbers fit into 64 bits.

    Raises:
        ValueError: names the first field whose value has another type.
    """
    hints = get_type_hints(type(record))
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if not _fits(value, hints[field.name]):
            raise ValueError(f"{field.name} is {shorten(value)}")


def _fits(value: Any, kind: Any) -> bool:
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        if isinstance(value, kind):  # type: ignore[arg-type]
            check_fields(value)
        return isinstance(value, kind)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in arguments)
    if origin is tuple:
        kinds = arguments[:1] * len(value) if arguments[-1] is ... and isinstance(value, tuple) else arguments
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, kind)


def shorten(value: Any) -> str:
    """A value as a message shows it, in at most 60 characters; Python refuses to print a very long number."""
    try:
        return repr(value)[:60]
    except ValueError:
        return "a number of thousands of digits"


def told(error: BaseException) -> str:
    """What an error says, in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]
