"""The layering of the package: imports go downwards only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "marval"
FILES = sorted(SOURCE.rglob("*.py"))

# A room (a folder or module of the package) may import rooms of a lower level, and itself; rooms of one level do not
# know each other. A module may have a level of its own.
LEVELS = {
    "checks": -1,
    "config": 0,
    "runtime.rng": 0,
    "classes": 1,
    "runtime.philox": 1,
    "runtime.progress": 0,
    "runtime.provenance": 0,
    "rewards.efficientnet": 0,
    "presets": 1,
    "model": 1,
    "losses": 2,
    "sampling": 2,
    "runtime.distributed": 2,
    "io": 2,
    "spaces": 3,
    "text": 3,
    "io.onnx": 4,
    "data": 4,
    "pipeline": 4,
    "runtime": 5,
    "rewards": 5,
    "evaluate": 6,
    "train": 6,
    "recipe": 6,
    "__init__": 7,  # the public API, lazy
    "page": 7,
    "cli": 8,
    "__main__": 9,
}
ONLY = {"config": {"checks"}, "runtime.rng": set(), "model": {"config"}}  # narrower than their level


def room(parts):
    """The room that a module belongs to, by its dotted name's parts below marval."""
    own = ".".join(parts[:2])
    return own if own in LEVELS else parts[0]


def room_of(file):
    """The room that a file belongs to."""
    return room(file.relative_to(SOURCE).with_suffix("").parts)


def package(file):
    """The dotted name that a file's relative imports start from."""
    return ["marval", *file.relative_to(SOURCE).parts[:-1]]


def imported_modules(file):
    """The dotted names that a file imports, wherever in the file: `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package(file)[: len(package(file)) - node.level + 1] if node.level else []
            stem = ".".join([*parts, *([node.module] if node.module else [])])
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def imported_rooms(file):
    """The rooms of marval that a file imports; a name of the public API counts as `__init__`."""
    rooms = set()
    for name in imported_modules(file):
        parts = name.split(".")
        if parts[0] == "marval":
            known = len(parts) > 1 and any((SOURCE / f"{parts[1]}{end}").exists() for end in ("", ".py"))
            rooms.add(room(parts[1:3]) if known else "__init__")
    return rooms


def name_of(file):
    return str(file.relative_to(SOURCE))


def test_the_source_is_found():
    assert {"config.py", "sampling/loop.py", "model/mar.py", "train/distill.py"} <= {name_of(file) for file in FILES}
    assert imported_rooms(SOURCE / "sampling/orders.py") == {"runtime.philox"}
    assert "torch.Tensor" in set(imported_modules(SOURCE / "sampling/loop.py"))


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_go_downwards_only(file):
    own = room_of(file)
    assert {own, *imported_rooms(file)} <= set(LEVELS), "give each a level in the table above"
    for other in imported_rooms(file) - {own}:
        assert LEVELS[other] < LEVELS[own], f"{own} must not import {other}"
        assert own not in ONLY or other in ONLY[own], f"{own} must not import {other}"


def test_config_needs_nothing_but_the_standard_library():
    roots = {name.split(".")[0] for part in ("checks", "config") for name in imported_modules(SOURCE / f"{part}.py")}
    assert roots > {"marval"}
    assert roots - {"marval"} <= sys.stdlib_module_names


def test_importing_config_does_not_import_torch():
    script = "import sys, marval.config; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "[]"
