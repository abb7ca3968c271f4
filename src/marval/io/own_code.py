"""A user's own function or class, named on the command line: "module:function", or "path/to/file.py:function"."""

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
            ValueError: no such file or module, an error in it, or nothing of that name in it.
        """
        self.spec, self.option = spec, option
        place, _, name = spec.rpartition(":")
        if not place or not name.isidentifier():
            expected = ", ".join([*others, "file.py:function or module:function"])
            raise ValueError(f"{option} {spec!r}: expected {expected}")
        module = self._guarded(lambda: load_module(place))
        if not hasattr(module, name):
            raise ValueError(f"{option} {spec!r}: {place} has no function {name}")
        self.file = Path(module.__file__) if getattr(module, "__file__", None) else None
        named = getattr(module, name)
        self.function = self._guarded(named) if isinstance(named, type) else named
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


def load_module(place: str) -> ModuleType:
    """Import a module by its path (ending in .py) or by its name, from among the installed ones or the current folder.

    The folder stays at the end of the search path, for what the module imports.
    """
    by_path, file = place.endswith(".py"), Path(place).expanduser().absolute()
    folder = str(file.parent if by_path else Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    importlib.invalidate_caches()
    if not by_path:
        return importlib.import_module(place)
    spec = importlib.util.spec_from_file_location(str(file), file)  # a name that no other module has
    assert spec is not None  # as the file's name ends in .py
    assert spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_one_line(error: BaseException) -> str:
    """Describe an error of a user's code in one line: file, line, kind and message."""
    message = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, SyntaxError):
        return message  # which names them
    # Neither Python's own code, nor a library's, nor marval's.
    others = ("<", str(Path(os.__file__).parent), str(Path(__file__).parents[1]))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(others) and "site-packages" not in Path(frame.filename).parts:
            return f"{frame.filename}, line {frame.lineno}: {message}"
    return message
