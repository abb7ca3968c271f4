"""The command line in this process: fixtures."""

import sys
from collections import namedtuple

import pytest
from jaxtyping import config

from marval.cli import main

Done = namedtuple("Done", "code out err")


@pytest.fixture
def marval(monkeypatch, capsys, tmp_path):
    """Run a verb in this process, in the test's own folder: exit code (`code`, if not None), output, errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["marval", *map(str, arguments)])
        capsys.readouterr()
        ended = 0
        try:
            main()
        except SystemExit as end:
            ended = end.code or 0
        done = Done(ended, *capsys.readouterr())
        assert code in (None, done.code), done.err
        return done

    return run


@pytest.fixture
def refusal(marval):
    """The one line that a verb refuses with."""

    def run(*arguments):
        said = marval(*arguments, code=2).err.strip()
        assert len(said.splitlines()) == 1, said
        return said

    return run


@pytest.fixture
def unchecked():
    """As users run it: without the tests' checks of shapes and types."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
