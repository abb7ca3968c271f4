"""Command lines from plain functions, by the standard library's argparse.

A function's parameters before the `*` are positional. One whose type is a dataclass is a group of options: its
docstring is the group's title, the comments behind its fields are the help, and their annotations are rules, which
the group checks itself (see `marval.config`).

Settings of a training run have presets: what is typed is laid over the preset that `--preset` names.
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import itertools
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from marval.checks import check
from marval.presets import PRESETS, RunConfig, settings_of

SYMBOLS = {"iterations": "K", "gradient_iterations": "M", "diffusion_steps": "T", "guidance": "W"}  # the paper's
REQUIRED = inspect.Parameter.empty


@dataclasses.dataclass(frozen=True)
class Option:
    """What can be typed: a positional parameter of a function, or a field of a group."""

    place: str  # "parameter", or "parameter.field" of a group
    annotation: Any
    default: Any
    help: str
    group: str
    positional: bool = False

    @property
    def flag(self) -> str:
        """What names it, on the command line and in messages."""
        return self.metavar if self.positional else f"--{self.place.rpartition('.')[2].replace('_', '-')}"

    @property
    def many(self) -> bool:
        """Whether several values may be typed."""
        return self.outer is not None

    @property
    def outer(self) -> Any:
        """The type `tuple[...]` of several values, without rules; None of a single one."""
        kind = self.annotation
        while get_origin(kind) in (Union, UnionType, Annotated):
            kind = get_args(kind)[0]
        return kind if get_origin(kind) is tuple else None

    @property
    def plain(self) -> Any:
        """The type of one value without rules: X of `X | None`, `tuple[X, ...]` and `Annotated[X, rule]`."""
        kind = self.annotation
        while get_origin(kind) in (tuple, Union, UnionType, Annotated):
            kind = get_args(kind)[0]
        return kind

    @property
    def metavar(self) -> str:
        """What stands for a value in the help."""
        if get_origin(self.plain) is Literal:
            return "{" + ",".join(get_args(self.plain)) + "}"
        name = self.place.rpartition(".")[2]
        kinds = {} if self.positional else {int: "N", float: "X", Path: "PATH"}
        return SYMBOLS.get(name) or kinds.get(self.plain, name.upper())

    def add_to(self, group: Any) -> None:
        """Add it to a group of a parser."""
        default = " ".join(map(str, self.default)) if isinstance(self.default, tuple) else self.default
        known = default not in (None, "", REQUIRED) and not isinstance(default, bool)
        text = self.help + (f" (default: {default})" if known else "")
        more: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%"), "metavar": self.metavar}
        if self.positional:
            more["choices"] = get_args(self.plain) or None
            group.add_argument(self.place, nargs="*" if self.many else "?" if self.default is None else None, **more)
            return
        if self.plain is bool:
            del more["metavar"]
            more["action"] = argparse.BooleanOptionalAction if self.default else "store_true"
        elif self.many:  # one text a flag: it may hold spaces, and a model's name may follow it
            count = "*" if get_args(self.outer)[-1] is ... else len(get_args(self.outer))
            more |= {"action": "append"} if self.plain is str else {"action": "extend", "nargs": count}
        group.add_argument(self.flag, dest=self.place, **more)

    def value_of(self, typed: Any) -> Any:
        """Convert what was typed; what is no number stays a text, which its group refuses."""
        if isinstance(typed, list):
            return tuple(map(self.value_of, typed))
        with contextlib.suppress(ValueError):
            return self.plain(typed) if self.plain in (int, float, Path) else typed
        return typed


def options_of(function: Callable[..., Any], preset: str = PRESETS[0]) -> list[Option]:
    """List the options of a function, with the defaults of a preset."""
    hints, options = get_type_hints(function, include_extras=True), []
    for name, parameter in inspect.signature(function).parameters.items():
        kind = hints[name]
        if dataclasses.is_dataclass(kind):
            start, texts, title = defaults_of(kind, preset), comments_of(kind), (kind.__doc__ or "").partition(".")[0]
            title = title[:1].lower() + title[1:]
            for field, annotation in get_type_hints(kind, include_extras=True).items():
                options.append(Option(f"{name}.{field}", annotation, getattr(start, field), texts[field], title))
        else:
            text = re.search(rf"^ +{name}: (.*(?:\n {{8}}.*)*)", inspect.getdoc(function) or "", re.MULTILINE)
            told, first = " ".join(text[1].split()) if text else "", parameter.kind is not parameter.KEYWORD_ONLY
            group = "arguments" if first else "options"
            options.append(Option(name, kind, parameter.default, told, group, positional=first))
    return options


def defaults_of(group: Any, preset: Any) -> Any:
    """A group with its defaults; of settings of training those of the preset."""
    return settings_of(group, preset) if issubclass(group, RunConfig) else group()


def comments_of(group: Any) -> dict[str, str]:
    """Read the comment behind each of a dataclass's fields."""
    sources = "".join(inspect.getsource(one) for one in group.__mro__[-2::-1] if hasattr(one, "__dataclass_fields__"))
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", sources, re.MULTILINE))


def description(function: Callable[..., Any], width: int) -> str:
    """A docstring's text before its "Args:", wrapped; commands to copy stay whole."""
    parts = (inspect.getdoc(function) or "").partition("\nArgs:\n")[0].split("\n\n")
    commands = ("marval ", "torchrun ")
    wrapped = [textwrap.indent(p, "  ") if p.startswith(commands) else textwrap.fill(p, width) for p in parts]
    return "\n\n".join(wrapped)


class Parser(argparse.ArgumentParser):
    """argparse, which refuses by a `ValueError` of one line."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print below the usage."""
        raise ValueError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")


def parser_of(options: Sequence[Option], function: Callable[..., Any], prog: str) -> Parser:
    """The parser of a function's options."""
    width = min(110, shutil.get_terminal_size().columns)
    forms = {REQUIRED: "{}", None: "[{}]", (): "[{} ...]"}  # by the default
    usage = [forms[option.default].format(option.flag) for option in options if option.positional]
    parser = Parser(
        prog=prog, usage=" ".join([prog, *usage, "[options]"]), add_help=False, allow_abbrev=False,
        description=description(function, width),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=width),
    )  # fmt: skip
    for title, group in itertools.groupby(options, lambda option: option.group):
        added = parser.add_argument_group(title)
        for option in group:
            option.add_to(added)
    return parser


def read(function: Callable[..., None], arguments: Sequence[str], prog: str) -> Callable[[], None]:
    """Parse what was typed for a function, and return the function with these arguments, or what prints its help.

    Raises:
        ValueError: an unknown option, a missing argument, or a value that does not fit; the option is named.
    """
    asked = re.search(r"--preset[ =](\S+)", " ".join(arguments))
    preset = asked[1] if asked and asked[1] in PRESETS else PRESETS[0]  # another one is refused with its option
    options = {option.place: option for option in options_of(function, preset)}
    parser = parser_of(list(options.values()), function, prog)
    if {"-h", "--help"} & set(arguments):
        return functools.partial(print, parser.format_help(), end="")
    namespace, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        flags = [option.flag for option in options.values() if not option.positional]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=1, cutoff=0.75)
        told = f"did you mean {near[0]}?" if near else f"see {prog} --help"
        raise ValueError(f"unknown argument {unknown[0]}: {told}")
    typed = {place: options[place].value_of(text) for place, text in vars(namespace).items()}
    values: dict[str, Any] = {}
    for name, kind in get_type_hints(function, include_extras=True).items():
        if dataclasses.is_dataclass(kind):
            fields = {p.partition(".")[2]: value for p, value in typed.items() if p.startswith(f"{name}.")}
            values[name] = with_fields(defaults_of(kind, preset), fields)
        elif name in typed:
            check(options[name].flag, typed[name], kind)
            values[name] = typed[name]
    return functools.partial(function, **values)


def run_script(function: Callable[..., None]) -> None:
    """Call a script's function with what was typed; see `in_one_line`."""
    prog = Path(sys.argv[0]).name
    in_one_line(prog, lambda: read(function, sys.argv[1:], prog)())


def in_one_line(prog: str, job: Callable[[], None]) -> None:
    """Do a command's job; a `ValueError` or `OSError` becomes one line on standard error and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an ASCII terminal gets ? for what it cannot show
    try:
        job()
        print(end="", flush=True)
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's own last flush
        sys.exit(141)  # as a shell says of a program that SIGPIPE ended
    except (ValueError, OSError) as error:
        if os.environ.get("MARVAL_DEBUG"):
            raise
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)  # under torchrun, process 0 mostly says the same, and its end ends this one
        file = error.filename if isinstance(error, OSError) else None
        told, code = f"{file}: {error.strerror}" if file and isinstance(error, OSError) else str(error), 2
    except KeyboardInterrupt as interrupt:
        told, code = ": ".join(["interrupted", *map(str, interrupt.args)]), 130
    else:
        return
    print(f"{prog}: {told}", file=sys.stderr)
    sys.exit(code)


def with_fields(group: Any, fields: Mapping[str, Any]) -> Any:
    """Return the group with these values; in a refusal the first word, a field's name, becomes its flag."""
    try:
        return dataclasses.replace(group, **fields)
    except ValueError as error:
        name, _, told = str(error).partition(" ")
        raise ValueError(f"--{name.replace('_', '-')} {told}" if hasattr(group, name) else str(error)) from None
