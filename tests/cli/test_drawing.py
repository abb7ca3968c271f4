"""The verb that draws: pictures that are never lost nor overwritten; and the devices that verbs take."""

import itertools

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
    refused(run(*draw), "00000-cross-0.png is there already, and 3 more files", "--force")
    assert mine.read_text() == "mine"
    assert run(*draw, "--force")[0] == 0
    assert Image.open(mine).size == (8, 8)


def test_many_pictures_are_saved_as_they_are_drawn(run, workspace, monkeypatch):
    sample_batches = Pipeline.sample_batches

    def fails_at_the_third(*arguments, **settings):
        yield from itertools.islice(sample_batches(*arguments, **settings), 2)
        raise ValueError("no more")

    monkeypatch.setattr(Pipeline, "sample_batches", fails_at_the_third)
    refused(run("sample", "student", "--count", 5, "--batch-size", 2, "--iterations", 2), "no more")
    assert len(list((workspace / "samples").glob("*.png"))) == 4
    monkeypatch.undo()


def test_a_thousand_pictures_need_a_batch_of_memory(run, workspace, monkeypatch):
    """Each picture has its own seed, class and recipe, whatever the batch; the grid shows the first hundred."""
    monkeypatch.chdir(workspace)
    code, said, _ = run("sample", "student", "--count", 130, "--batch-size", 50, "--iterations", 1, "--seed", 5)
    assert code == 0
    assert said == "130 images and grid.png (the first 100) in samples\n"
    assert len(list((workspace / "samples").glob("0*.png"))) == 130
    assert run("sample", "student", "--like", "samples/00129-square-134.png", "--out", "again")[1].endswith(
        "pixel for pixel\n"
    )
    refused(run("sample", "student", "--batch-size", 0), "--batch-size 0")


def test_a_picture_that_is_checked_is_never_replaced(run, workspace):
    assert run("sample", "student", "--count", 1, "--iterations", 2)[0] == 0
    file = workspace / "samples/00000-cross-0.png"
    before = file.read_bytes()
    code, said, _ = run("sample", "student", "--like", file, "--out", "samples")
    assert code == 0
    assert "the same, pixel for pixel" in said
    assert file.read_bytes() == before
    notes = PngInfo()
    with Image.open(file) as picture:
        notes.add_itxt("marval", picture.info["marval"])
        picture.point(lambda value: 255 - value).save(file, pnginfo=notes)
        picture.save("bare.png")
    changed = file.read_bytes()
    for more in ((), ("--force",)):
        said = run("sample", "student", "--like", file, "--out", "samples", *more)
        refused(said, "differs by up to", "nothing was written")
        assert file.read_bytes() == changed
    code, said, _ = run("sample", "student", "--like", file, "--out", "other")
    assert code == 0
    assert "differs by up to" in said
    assert (workspace / "other" / file.name).is_file()
    refused(run("sample", "student", "--like", file, "--out", "other"), "is there already", "--force")
    refused(run("sample", "--like", "bare.png"), "bare.png has no recipe")


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", "meta", "hpu", "privateuseone", "", "cpu:zero", "mps", "xla"])
def test_a_device_that_is_not_here_is_refused_in_one_line(name):
    with pytest.raises(ValueError, match=r"^--device [^\n]*: not here \([^\n]+\); expected auto, cpu or cuda$"):
        usable_device(name)


def test_auto_takes_the_accelerator_if_it_was_tested(monkeypatch, capsys):
    for kind, expected in (("cuda", "cuda"), ("mps", "cpu"), (None, "cpu")):
        found = None if kind is None else torch.device(kind)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available, found=found: found)
        assert usable_device("auto") == expected
    monkeypatch.setattr("marval.cli.arguments.TESTED", ())
    assert usable_device("cpu") == "cpu"
    assert "never tested on cpu" in capsys.readouterr().err
