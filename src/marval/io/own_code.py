"""A user's own function or class, named on the command line: "module:function", or "path/to/file.py:function"."""

import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from marval.io.files import sha256_of


class OwnCode:
    """A function of the user's, or an instance of a class, which is made without arguments.

    A call's errors become a `ValueError` of one line that names the user's file and line.
    """

    def __init__(self, spec: str, option: str, others: Iterable[str] = ()):
        """Find what `spec` names; `option` is what it was given for, and `others` what else could have been given.

        Raises:
            ValueError: no such file or module, an error in it, or nothing of that name in it that can be called.
        """
        self.spec, self.option = spec, option
        place, _, name = spec.rpartition(":")
        expected = ", ".join([*others, "file.py:function or module:function"])
        if not place or not name.isidentifier():
            raise ValueError(f"{option} {spec!r}: expected {expected}")
        module = self._guarded(lambda: load_module(place, expected))
        if not hasattr(module, name):
            raise ValueError(f"{option} {spec!r}: {place} has no function {name}")
        self.file = Path(module.__file__) if getattr(module, "__file__", None) else None
        named = getattr(module, name)
        self.function = self._guarded(named) if isinstance(named, type) else named
        if not callable(self.function):
            raise ValueError(
                f"{option} {spec!r}: {name} is a {type(self.function).__name__}, which cannot be called: expected a "
                "function, or a class with __call__"
            )
        if isinstance(self.function, nn.Module):
            self.function.eval().requires_grad_(False)

    def __call__(self, *arguments: Any) -> Any:
        return self._guarded(lambda: self.function(*arguments))

    @property
    def sha256(self) -> str:
        """SHA-256 of the file that it is written in; "" where there is none."""
        return sha256_of(self.file) if self.file is not None and self.file.is_file() else ""

    def _guarded(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (Exception, SystemExit) as error:  # whatever a user's code raises
            raise ValueError(f"{self.option} {self.spec!r}: {in_one_line(error)}") from error


def load_module(place: str, expected: str) -> ModuleType:
    """Import a module by its path (ending in .py) or by its name.

    A name is looked for in the current folder first, as `python` does for a script, then among the installed modules.
    The folder that it was found in stays at the end of the search path, for what the module imports later.
    """
    by_path = place.endswith(".py")
    file = (Path(place).expanduser() if by_path else Path(*place.split(".")).with_suffix(".py")).absolute()
    if by_path and not file.is_file():
        raise ValueError(f"{place} does not exist")
    in_package = not by_path and "." in place and (file.parent / "__init__.py").is_file()
    folder = str(file.parent if by_path else Path.cwd())
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        return load_file(file) if file.is_file() and not in_package else importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise  # something that the module imports
        raise ValueError(f"no module {error.name} in {os.getcwd()} or installed: expected {expected}") from None
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)


def load_file(file: Path) -> ModuleType:
    """Import a file, once, under a name that no other module has or imports."""
    name = f"{file.stem}_{hashlib.sha256(os.fsencode(file)).hexdigest()[:8]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None  # as the name ends in .py
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def in_one_line(error: BaseException) -> str:
    """Describe an error of a user's code in one line: file, line, kind and message."""
    message = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    # Neither Python's own code, nor a library's, nor marval's.
    others = ("<", str(Path(os.__file__).parent), str(Path(__file__).parents[1]))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(others) and "site-packages" not in Path(frame.filename).parts:
            return f"{frame.filename}, line {frame.lineno}: {message}"
    return message.removeprefix("ValueError: ")
