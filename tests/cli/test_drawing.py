"""The verb that draws: pictures are never lost nor overwritten, and drawn again; and the devices that verbs take."""

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from marval.cli.arguments import usable_device
from marval.pipeline import Pipeline
from workspace import refused


def test_pictures_that_are_there_are_kept_unless_forced(run, workspace):
    draw = ("sample", "student", "--count", 3, "--iterations", 2)
    assert run(*draw)[0] == 0
    mine = workspace / "samples/00000-cross-0.png"
    mine.write_text("mine")
    refused(run(*draw), "00000-cross-0.png is there already", "--force")
    assert mine.read_text() == "mine"
    assert run(*draw, "--force")[0] == 0
    assert Image.open(mine).size == (8, 8)


def test_many_pictures_are_saved_as_they_are_drawn(run, workspace, monkeypatch):
    """Each has its own seed, class and recipe, whatever the batch."""
    draw = ("sample", "student", "--batch-size", 2, "--iterations", 2, "--seed", 5, "--count", 5)
    sample, calls = Pipeline.sample, []

    def fails_at_the_third(*arguments, **settings):
        calls.append(settings["seed"])
        if len(calls) == 3:
            raise ValueError("no more")
        return sample(*arguments, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(Pipeline, "sample", fails_at_the_third)
        refused(run(*draw), "no more")
    assert len(list((workspace / "samples").glob("*.png"))) == 4
    assert run(*draw, "--out", "whole")[1] == "5 images and grid.png in whole\n"
    code, said, _ = run("sample", "student", "--like", "whole/00004-cross-9.png", "--out", "again")
    assert code == 0
    assert "the same, pixel for pixel" in said or "differs by up to 1 of" in said


def test_a_picture_of_another_precision_is_drawn_again_in_it(run, workspace):
    draw = ("sample", "student", "--count", 2, "--iterations", 2, "--batch-size", 1)
    assert run(*draw, "--dtype", "bfloat16")[0] == run(*draw, "--out", "plain")[0] == 0
    file = "00001-square-1.png"
    with Image.open(workspace / "samples" / file) as picture, Image.open(workspace / "plain" / file) as plain:
        assert picture.tobytes() != plain.tobytes()
    assert "the same, pixel for pixel" in run("sample", "student", "--like", f"samples/{file}", "--out", "again")[1]


def test_a_picture_that_is_drawn_again_takes_no_other_settings(run, workspace):
    assert run("sample", "student", "--count", 1, "--iterations", 2, "--out", "first")[0] == 0
    again = ("sample", "student", "--like", "first/00000-cross-0.png", "--out", "again")
    for more in (("--seed", 7), ("--count", 9), ("--iterations", 3), ("--classes", "square")):
        refused(run(*again, *more), "--like draws what the picture's recipe says")
    assert run(*again)[0] == 0


def test_a_picture_that_was_changed_is_told_and_stays(run, workspace):
    assert run("sample", "student", "--count", 1, "--iterations", 2)[0] == 0
    file = workspace / "samples/00000-cross-0.png"
    notes = PngInfo()
    with Image.open(file) as picture:
        notes.add_itxt("marval", picture.info["marval"])
        picture.point(lambda value: 255 - value).save(file, pnginfo=notes)
        picture.save("bare.png")
    changed = file.read_bytes()
    refused(run("sample", "student", "--like", file), "is there already", "--force")
    code, said, _ = run("sample", "student", "--like", file, "--out", "other")
    assert code == 0
    assert "differs by up to" in said
    assert file.read_bytes() == changed
    refused(run("sample", "--like", "bare.png"), "bare.png", "no recipe")


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", "meta", "hpu", ""])
def test_a_device_that_is_not_here_is_refused_in_one_line(name):
    with pytest.raises(ValueError, match=r"^--device [^\n]*: not here \([^\n]+\); expected auto, cpu or cuda$"):
        usable_device(name)


def test_auto_takes_cuda_where_it_is_here(monkeypatch):
    for here, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda here=here: here)
        assert usable_device("auto") == expected
