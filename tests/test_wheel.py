"""The wheel holds every file that the package needs, and works where it is installed."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

import marval

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "marval"
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a copy of this tree."""
    root = tmp_path_factory.mktemp("dist")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(lambda name: name and (ROOT / name).exists(), listing.split("\0")):
        target = root / "tree" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    command = [sys.executable, "-c", BUILD, str(root)]
    built = subprocess.run(command, cwd=root / "tree", capture_output=True, text=True, timeout=120, check=True)
    return root / built.stdout.strip().splitlines()[-1]


def test_the_wheel_holds_every_file_as_a_file(wheel):
    expected = {
        str(file.relative_to(PACKAGE.parent)): file.read_bytes()
        for file in PACKAGE.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        assert not any(info.external_attr >> 28 == 0o12 for info in archive.infolist())  # no symlink
        assert {n: archive.read(n) for n in archive.namelist() if n.startswith("marval/")} == expected


def test_the_installed_command_draws_from_an_empty_folder(wheel, tmp_path):
    folder, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}

    def run(*command):
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, wheel)
    assert run(sys.executable, "-c", "import marval; print(marval.__file__)").startswith(str(folder))
    assert marval.__version__ in run(folder / "bin" / "marval", "--version")
    run(folder / "bin" / "marval", "sample", "fashion-student", "--count", "2", "--out", "samples")
    assert Image.open(empty / "samples" / "grid.png").width > 28
    run(folder / "bin" / "marval", "sample", "emoji-student", "--prompt", "a shark", "--count", "1", "--out", "emoji")
    assert Image.open(empty / "emoji" / "00000-shark-3d-style-0.png").size == (32, 32)
