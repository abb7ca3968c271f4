"""The command line in odd environments: no home, other locales, no terminal, a reader that leaves, a full disk."""

import io
import os
import pty
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import marval as package
from marval.cli import VERBS
from marval.io.files import cache_folder, user_cache
from processes import MARVAL


def without_home(monkeypatch):
    """As for a container's user without an entry in passwd."""

    def nobody(*_):
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)


def with_read_only_home(monkeypatch):
    monkeypatch.setenv("HOME", "/proc/version")  # nothing can be made there, not even by root
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)


def with_read_only_cache(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/1/nothing")


@pytest.mark.parametrize("odd", [without_home, with_read_only_home, with_read_only_cache])
def test_what_is_kept_goes_to_the_temporary_files_where_there_is_no_home(odd, monkeypatch, tmp_path, marval, work):
    odd(monkeypatch)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    marval("evaluate", work / "tiny", "--data", f"folder:{work / 'shapes'}", "--samples", 8, "--iterations", 2,
           "--batches", "--out", "figures.json")  # fmt: skip
    assert cache_folder() == tmp_path / f"marval-{os.getuid()}"
    assert cache_folder().stat().st_mode & 0o077 == 0
    assert list(cache_folder().glob("statistics-*.safetensors"))


def test_the_cache_is_where_xdg_says_and_an_empty_variable_says_nothing(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value, expected in (("", "home/.cache"), ("relative", "home/.cache"), (str(tmp_path / "there"), "there")):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder() == user_cache() == tmp_path / expected / "marval"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "home/.cache/marval"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "there"]


def test_a_strangers_folder_among_the_temporary_files_is_not_used(monkeypatch, tmp_path):
    without_home(monkeypatch)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stranger = tmp_path / f"marval-{os.getuid()}"
    stranger.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: stranger.stat().st_uid + 1)
    (tmp_path / f"marval-{os.getuid()}").mkdir()
    assert cache_folder().name not in {path.name for path in (stranger, tmp_path / f"marval-{os.getuid()}")}


@pytest.mark.parametrize(
    "odd",
    [
        {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "TERM": "dumb", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"},
    ],
    ids=["ascii", "no colour"],
)
def test_pictures_are_drawn_below_a_folder_with_any_name(odd, work):
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "TERM", "LANG")}
    for arguments in (["sample", "tiny", "--count", "2", "--out", "bïlder 画", "--force"], ["evaluate", "--help"]):
        done = subprocess.run(
            [*MARVAL, *arguments], cwd=work, env={**environment, **odd}, capture_output=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == b""
        assert b"\x1b" not in done.stdout
    assert len(list((work / "bïlder 画").glob("*.png"))) == 3


def test_what_a_terminal_cannot_show_is_a_question_mark(marval, monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setitem(VERBS, "sample", lambda: print("0.5 ± 0.1 × \udcff"))
    monkeypatch.setattr(sys, "stdout", shown)
    marval("sample")
    assert shown.buffer.getvalue() == b"0.5 ? 0.1 ? ?\n"


def test_no_color_means_none_on_a_terminal(work):
    main_end, terminal = pty.openpty()
    environment = {**os.environ, "NO_COLOR": "1", "TERM": "xterm-256color"}
    process = subprocess.Popen([*MARVAL, "sample", "--help"], cwd=work, env=environment, stdout=terminal)
    os.close(terminal)
    shown = b""
    try:
        while part := os.read(main_end, 65536):
            shown += part
    except OSError:  # how Linux says that the other end was closed
        pass
    os.close(main_end)
    assert process.wait(timeout=60) == 0
    assert b"--classes" in shown
    assert not re.search(rb"\x1b\[[0-9;]*m", shown)


@pytest.mark.parametrize(
    ("arguments", "both", "unbuffered"),
    [(["--help"], False, ""), (["sample", "--help"], False, "1"), (["sampel"], True, ""), (["sampel"], False, "1")],
)
def test_a_reader_that_leaves_ends_it_quietly(arguments, both, unbuffered, work):
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [*MARVAL, *arguments], cwd=work, env={**os.environ, "PYTHONUNBUFFERED": unbuffered}, stdout=write_end,
        stderr=write_end if both else subprocess.PIPE, timeout=60,
    )  # fmt: skip
    os.close(write_end)
    bad_verb = arguments == ["sampel"]
    assert done.returncode == (2 if bad_verb else 141)
    if not both:
        assert done.stderr.count(b"\n") == (1 if bad_verb else 0), done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, a device that is always full")
def test_a_full_device_is_one_line(work):
    with open("/dev/full", "w") as full:
        done = subprocess.run([*MARVAL, "--help"], cwd=work, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "marval: [Errno 28] No space left on device\n"


def test_closed_outputs_are_no_trouble(work):
    for redirect, code in ((">&-", 0), ("2>&-", 0), (">&- 2>&-", 0)):
        done = subprocess.run(
            ["bash", "-c", f'exec "$@" {redirect}', "bash", *MARVAL, "--version"], cwd=work, capture_output=True,
            timeout=60,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (code, b"")


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


@pytest.mark.parametrize("chosen", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "9"}, {"KMP_BLOCKTIME": "0"}])
def test_threads_wait_passively_unless_the_user_chose(chosen, marval, monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    marval("--version")
    assert os.environ.get("OMP_WAIT_POLICY") == (chosen.get("OMP_WAIT_POLICY") if chosen else "PASSIVE")


def test_the_command_line_sets_it_before_torch_is_there():
    script = "import sys, marval.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False\n"
