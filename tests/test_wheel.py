"""What is built for other machines holds every file that the package needs, and works where it is installed."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

import marval

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "marval"
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"


def build(kind, source, out):
    run = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(out)], cwd=source, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return out / run.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An sdist of a copy of this tree and, as `python -m build` does, the wheel made from it."""
    root = tmp_path_factory.mktemp("dist")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(lambda name: name and (ROOT / name).exists(), listing.split("\0")):
        target = root / "tree" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    sdist = build("sdist", root / "tree", root)
    with tarfile.open(sdist) as archive:
        archive.extractall(root / "unpacked", filter="data")
    (unpacked,) = (root / "unpacked").iterdir()
    return sdist, build("wheel", unpacked, root)


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A folder with the wheel and its command, as pip installs them, away from the checkout."""
    folder = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(built[1])], check=True, timeout=120)
    return folder


def test_wheel_and_sdist_hold_every_file_as_a_file(built):
    sdist, wheel = built
    expected = {
        str(file.relative_to(PACKAGE.parent)): file.read_bytes()
        for file in PACKAGE.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        assert not any(info.external_attr >> 28 == 0o12 for info in archive.infolist())  # no symlink
        assert {n: archive.read(n) for n in archive.namelist() if n.startswith("marval/")} == expected
    with tarfile.open(sdist) as archive:
        assert all(member.isfile() or member.isdir() for member in archive)
        assert {name.split("/", 2)[2] for name in archive.getnames() if "/src/marval/" in name} >= set(expected)


def test_the_installed_command_draws_from_an_empty_folder(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}

    def run(*command):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run(sys.executable, "-c", "import marval; print(marval.__file__)").startswith(str(installed))
    assert marval.__version__ in run(installed / "bin" / "marval", "--version")
    run(installed / "bin" / "marval", "sample", "fashion-student", "--count", "2", "--out", "samples")
    assert Image.open(tmp_path / "samples" / "grid.png").width > 28
