"""The tools that make models, pictures and figures for the documents: animations, panels, curves, gaps."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import animate
import curves
import side_by_side
import token_gap
from marval.config import OneStep
from marval.evaluate.results import read_results, write_results
from marval.io.checkpoint import save_model
from marval.io.images import grid
from marval.pipeline import Pipeline
from small import randn
from tiny import tiny_config, tiny_data, tiny_model


def test_tokens_appear_and_stay():
    moments = animate.unmasking(Pipeline(tiny_model(), tiny_config()), ["cross", "square"], 3, 5)
    assert len(moments) == 6
    assert (moments[0][0] == 0.5).all()
    hidden = [int((images == 0.5).sum()) for images, _ in moments]
    assert hidden == sorted(hidden, reverse=True)
    assert hidden[-1] == 0
    for (before, early), (after, late) in itertools.pairwise(moments):
        assert early < late
        assert (before == after)[before != 0.5].all()


def test_the_animation_has_a_frame_for_each_iteration(tmp_path):
    save_model(tmp_path / "tiny", tiny_model(), tiny_config())
    animate.main((str(tmp_path / "tiny"),), iterations=4, out=tmp_path / "a.gif")
    frames = [np.asarray(frame.convert("L")) for frame in ImageSequence.Iterator(Image.open(tmp_path / "a.gif"))]
    assert len(frames) == 5
    assert all((a != b).any() for a, b in itertools.pairwise(frames))


def test_panels_side_by_side_show_the_same_classes(tmp_path, monkeypatch):
    data, model, out = tiny_data(), tmp_path / "tiny", tmp_path / "side-by-side.png"
    monkeypatch.setattr(side_by_side, "load_images", lambda spec: {"folder:x": data}[spec])
    real = side_by_side.real_images(data, torch.tensor([3, 1]), seed=0)
    of = [next(i for i, other in enumerate(data.images) if torch.equal(image * 255, other.float())) for image in real]
    assert len(set(of)) == 4
    assert data.labels[of].tolist() == [0, 0, 0, 1]
    save_model(model, tiny_model(), tiny_config())
    side_by_side.main((str(model),), data="folder:x", side=2, seed=5, out=out)
    tiny = Pipeline(tiny_model(), tiny_config())
    left = grid(side_by_side.real_images(data, torch.tensor([2, 2]), 5).split(2), title="real images", scale=2)
    drawn, title = tiny.sample([0, 0, 1, 1], seed=5), f"tiny, K = {tiny.default_iterations}"
    right = grid(drawn.split(2), title=title, scale=2)
    picture = Image.open(out)
    assert picture.size == (left.width + 16 + right.width, left.height)
    assert picture.crop((0, 0, *left.size)).tobytes() == left.tobytes()
    assert picture.crop((left.width + 16, 0, *picture.size)).tobytes() == right.tobytes()


def test_the_gap_of_tokens_is_0_for_the_teacher_itself_and_tells_a_shift_from_a_spread():
    x, y = randn(200, 5, 3, seed=1), randn(200, 5, 3, seed=2)
    same, moved, wide = (token_gap.gap(x, other) for other in (y, y + 1.0, 2 * y))
    assert abs(same["energy distance / spread"]) < 0.02
    assert same["gap of means / deviation"] < 0.15
    assert moved["gap of means / deviation"] == pytest.approx(1.0, abs=0.15)
    assert moved["ratio of deviations"] == pytest.approx(1.0, abs=0.05)
    assert wide["ratio of deviations"] == pytest.approx(2.0, abs=0.1)
    assert min(moved["energy distance / spread"], wide["energy distance / spread"]) > 0.1
    teacher = Pipeline(tiny_model(), tiny_config())
    student = Pipeline(tiny_model(1), dataclasses.replace(tiny_config(), draw=OneStep()))
    how = {"guidance": 1.5, "visible": [0, 4], "images": 6, "samples": 16, "seed": 0}
    gaps = token_gap.token_gaps(teacher, {"other": student}, tiny_data(), **how)
    for again, other in zip(gaps["the teacher again"].values(), gaps["other"].values(), strict=True):
        assert abs(again["energy distance / spread"]) < 0.1 < other["energy distance / spread"]


def test_curves_are_means_over_seeds_and_a_file_without_quality_is_refused(tmp_path):
    def row(k, seed, fd):
        draw = {"kind": "one_step", "guidance": 1.5}
        return {"model": "m", "draw": draw, "iterations": k, "samples": 9, "seed": seed, "fd": fd, "features": "f, x"}

    write_results(tmp_path / "a.json", "quality", [row(8, 0, 3.0), row(4, 0, 5.0), row(4, 1, 7.0)])
    rows = read_results(tmp_path / "a.json")["quality"]
    assert curves.lines(rows, "iterations", "fd") == {"m": [(4.0, 6.0), (8.0, 3.0)]}
    assert curves.lines(rows, "guidance", "fd") == {"m": [(1.5, 5.0)]}
    curves.main("iterations", tmp_path / "a.png", (tmp_path / "a.json",))
    assert Image.open(tmp_path / "a.png").size == (320, 300)
    write_results(tmp_path / "b.json", "timing", [])
    with pytest.raises(ValueError, match=r"b\.json has no figures of quality"):
        curves.main("iterations", tmp_path / "b.png", (tmp_path / "a.json", tmp_path / "b.json"))
