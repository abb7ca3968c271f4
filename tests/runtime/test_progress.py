"""Progress: a bar on a terminal, a line now and then elsewhere, nothing for what is soon done."""

import io
import sys

import pytest

from marval.runtime import progress as shown


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """What it is told to be, in seconds."""
    now = [0.0]
    monkeypatch.setattr("marval.runtime.progress.time.monotonic", lambda: now[0])
    return now


def test_long_work_says_how_far_it_is_and_short_work_nothing(clock, capsys):
    for seconds, quiet, said in ((0.5, False, 0), (12, True, 0), (12, False, 3)):
        with shown.progress(10, "drawing images", quiet=quiet) as advance:
            for _ in range(10):
                clock[0] += seconds
                with shown.progress(5, "inner"):  # a terminal has room for one bar
                    advance(1)
        assert len(lines := capsys.readouterr().err.splitlines()) == said
    assert lines[0] == "drawing images: 3 of 10, 1 min 24 s left"


def test_a_terminal_gets_a_bar_after_two_seconds(clock, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for seconds, seen in ((0.1, False), (3.0, True)):
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        with shown.progress(2, "drawing images") as advance:
            clock[0] += seconds
            advance(1)
        assert ("drawing images" in terminal.getvalue()) == seen
