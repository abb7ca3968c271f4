"""Progress: a bar on a terminal, a line now and then elsewhere, nothing for what is soon done."""

import sys

from marval.runtime import progress as shown


class Clock:
    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("marval.runtime.progress.time.monotonic", lambda: self.now)


def test_long_work_says_how_far_it_is_and_short_work_nothing(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    with shown.progress(10, "drawing images") as advance:
        for _ in range(10):
            clock.now += 0.5
            advance(1)
    assert capsys.readouterr() == ("", "")
    with shown.progress(10, "drawing images") as advance:
        for _ in range(10):
            clock.now += 12
            with shown.progress(5, "inner"):  # a terminal has room for one bar
                advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "drawing images: 3 of 10, 1 min 24 s left"
    assert len(lines) == 3
    with shown.progress(10, "drawing images", quiet=True) as advance:
        clock.now += 1000
        advance(5)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_after_two_seconds(monkeypatch):
    import io

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    clock = Clock(monkeypatch)
    for seconds, seen in ((0.1, False), (3.0, True)):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        with shown.progress(2, "drawing images") as advance:
            clock.now += seconds
            advance(1)
        assert ("drawing images" in terminal.getvalue()) == seen
