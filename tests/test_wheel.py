"""What is built for PyPI holds every file that the package needs, and works where it is installed (slow: minutes)."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "marval"
# The sdist first and the wheel from it, as `python -m build` does, so that the wheel shows what the sdist lacks.
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"


def build(kind, source, out):
    result = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(out)], cwd=source, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return out / result.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An sdist of a copy of this tree, and the wheel that is built from it."""
    root = tmp_path_factory.mktemp("dist")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    for name in filter(None, tracked):
        target = root / "tree" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to(os.readlink(ROOT / name))
        elif (ROOT / name).exists():
            shutil.copy2(ROOT / name, target)
    sdist = build("sdist", root / "tree", root)
    with tarfile.open(sdist) as archive:
        archive.extractall(root / "unpacked", filter="data")
    (unpacked,) = (root / "unpacked").iterdir()
    return sdist, build("wheel", unpacked, root)


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The wheel, unpacked as pip does, in a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(built[1])], check=True, timeout=120)
    return folder


@pytest.mark.slow
def test_wheel_and_sdist_hold_every_file_as_a_file(built):
    sdist, wheel = built
    wanted = {
        str(file.relative_to(PACKAGE.parent)): file.read_bytes()
        for file in PACKAGE.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert "marval/assets/fashion-sweep.json" in wanted
    assert "marval/page/painter.js" in wanted
    with zipfile.ZipFile(wheel) as archive:
        assert not any(info.external_attr >> 28 == 0o12 for info in archive.infolist())  # no symlink
        found = {name: archive.read(name) for name in archive.namelist() if name.startswith("marval/")}
    assert found == wanted
    with tarfile.open(sdist) as archive:
        assert all(member.isfile() or member.isdir() for member in archive)
        assert {name.split("/", 2)[2] for name in archive.getnames() if "/src/marval/" in name} >= set(wanted)


@pytest.mark.slow
def test_the_installed_wheel_draws_and_serves(installed, tmp_path):
    environment = {"PYTHONPATH": str(installed)}
    script = (
        "import json, marval.cli; from marval.page import bundled; from marval.page.studio import Studio; "
        "from marval.page.app import build; build(Studio.open(['fashion-student'], 'cpu')); "
        "print(json.dumps([marval.cli.__file__, bundled.tuning_rows()[1], sorted(bundled.quality_points())]))"
    )

    def run(*arguments):
        command = [sys.executable, *arguments]
        options = {"env": {**os.environ, **environment}, "capture_output": True, "text": True, "timeout": 300}
        result = subprocess.run(command, cwd=tmp_path, **options)
        assert result.returncode == 0, result.stderr
        return result.stdout

    file, rows, models = json.loads(run("-c", script).splitlines()[-1])
    assert file.startswith(str(installed))
    assert len(rows) >= 4
    assert models == ["fashion-student", "fashion-teacher", "fashion-tuned"]
    run("-m", "marval", "demo", "--out", "demo")
    assert Image.open(tmp_path / "demo" / "demo.png").width > 300
    from serving import serving

    with serving("fashion-student", cwd=tmp_path, **environment) as (address, _):
        assert address
