"""`marval animate`: a frame for each iteration, in which tokens appear and stay."""

import itertools

import numpy as np
from PIL import Image, ImageSequence

from marval.io.checkpoint import save_model
from marval.pipeline import Pipeline
from marval.unmasking import unmasking
from test_cli import marval, refused
from tiny import tiny_config, tiny_model


def test_tokens_appear_and_stay():
    moments = unmasking(Pipeline(tiny_model(), tiny_config()), ["cross", "square"], 3, 5)
    assert len(moments) == 6
    assert (moments[0][0] == 0.5).all()
    hidden = [int((images == 0.5).sum()) for images, _ in moments]
    assert hidden == sorted(hidden, reverse=True)
    assert hidden[-1] == 0
    for (before, early), (after, late) in itertools.pairwise(moments):
        assert early < late
        assert (before == after)[before != 0.5].all()


def test_the_command_writes_a_gif(tmp_path):
    save_model(tmp_path / "tiny", tiny_model(), tiny_config())
    result = marval("animate", "tiny", "--iterations", 4, "--out", "a.gif", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    frames = [np.asarray(frame.convert("L")) for frame in ImageSequence.Iterator(Image.open(tmp_path / "a.gif"))]
    assert len(frames) == 5
    assert all((a != b).any() for a, b in itertools.pairwise(frames))
    assert refused(marval("animate", "tiny", "--iterations", 17, cwd=tmp_path), "1 to 16")
    assert refused(marval("animate", cwd=tmp_path), "at least one model")
