"""The command line in odd environments: no home, other locales, a reader that leaves."""

import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import marval as package
from marval.cli import VERBS
from marval.io.files import cache_folder
from processes import MARVAL


@pytest.mark.parametrize("home", [None, "/proc/version"])  # a container's user without one; nothing can be made there
def test_without_a_home_what_is_kept_goes_to_temporary_files(home, monkeypatch, tmp_path):
    def nobody(*_):
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", home) if home else monkeypatch.delenv("HOME", raising=False)
    assert cache_folder().parent == tmp_path
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "there"))
    assert cache_folder() == tmp_path / "there/marval"


def test_pictures_are_drawn_below_a_folder_with_any_name_in_a_bare_locale(work):
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "TERM", "LANG")}
    done = subprocess.run(
        [*MARVAL, "sample", "tiny", "--count", "2", "--out", "bïlder 画"],
        cwd=work, env={**environment, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}, capture_output=True, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(list((work / "bïlder 画").glob("*.png"))) == 3


def test_what_a_terminal_cannot_show_is_a_question_mark(marval, monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setitem(VERBS, "sample", lambda: print("0.5 ± 0.1 × \udcff"))
    monkeypatch.setattr(sys, "stdout", shown)
    marval("sample")
    assert shown.buffer.getvalue() == b"0.5 ? 0.1 ? ?\n"


@pytest.mark.parametrize(
    ("arguments", "redirect", "code", "said"),
    [
        ("sample --help", ">&3", 141, b""),  # what reads from 3 has gone
        ("sampel", ">&3", 2, b"marval: unknown verb 'sampel': did you mean sample?\n"),
        ("--version", ">&-", 0, b""),
    ],
)
def test_outputs_that_take_nothing_are_no_trouble(arguments, redirect, code, said, work):
    read_end, write_end = os.pipe()
    os.close(read_end)
    gone = ["bash", "-c", f'exec 3>&{write_end}; exec "$@" {redirect}', "bash"]
    command = [*gone, *MARVAL, *arguments.split()]
    done = subprocess.run(command, cwd=work, pass_fds=[write_end], capture_output=True, timeout=60)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (code, said)


def test_what_the_system_refuses_is_one_line(refusal, marval, monkeypatch):
    def fails():
        raise PermissionError(13, "Permission denied", "/somewhere/x")

    monkeypatch.setitem(VERBS, "sample", fails)
    assert refusal("sample") == "marval: /somewhere/x: Permission denied"
    monkeypatch.setenv("MARVAL_DEBUG", "1")
    with pytest.raises(PermissionError):
        marval("sample")


def test_the_version(marval):
    assert marval("--version") == (0, f"marval {package.__version__}\n", "")
    metadata = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'version = "{package.__version__}"' in metadata


@pytest.mark.parametrize(("chosen", "policy"), [({}, "PASSIVE"), ({"GOMP_SPINCOUNT": "9"}, None)])
def test_threads_wait_passively_unless_the_user_chose(chosen, policy, marval, monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    marval("--version")
    assert os.environ.get("OMP_WAIT_POLICY") == policy
