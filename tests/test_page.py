"""The page without a browser: drawing, editing, varying, comparing, uploads, and what is refused."""

import dataclasses
import io
import itertools
import re
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from gradio import EventData
from PIL import Image

from marval.config import OneStep
from marval.io.checkpoint import save_model
from marval.io.images import to_pil
from marval.page import actions, bundled, views
from marval.page.actions import Desk
from marval.page.editing import Editing
from marval.page.studio import LAST_SEED, STAYS, Studio
from marval.page.uploads import UPLOAD_BYTES, read_upload
from marval.recipe import LONGEST, find_pipelines, read_recipe, redraw
from tiny import tiny_config, tiny_model


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """A tiny teacher (8 steps, guided) and a tiny student."""
    root = tmp_path_factory.mktemp("models")
    save_model(root / "teacher", tiny_model(), tiny_config())
    student = dataclasses.replace(tiny_config(), draw=OneStep(clip=True), name="student", order="spread")
    save_model(root / "student", tiny_model(), student)
    return [str(root / "teacher"), str(root / "student")]


@pytest.fixture(scope="module")
def studio(names):
    return Studio.open(names, "cpu")


def content(picture, format="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, format=format, **options)
    return buffer.getvalue()


def photo(size=(30, 20)):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def test_tokens_appear_iteration_by_iteration(studio, names):
    frames = list(studio.frames(studio.recipe(names[1], "square", 4, 5)))
    assert [frame.iteration for frame in frames] == [1, 2, 3, 4, 5]
    shown = [int(frame.drawn.sum()) for frame in frames]
    assert shown == sorted(set(shown))
    assert shown[-1] == 16
    seconds = [frame.seconds for frame in frames]
    assert seconds == sorted(seconds)
    assert [frame.picture is None for frame in frames] == [True] * 4 + [False]
    alone = studio.served(names[1]).pipeline.sample(["square"], seed=4, iterations=5)[0]
    assert torch.equal(frames[-1].picture.image, alone)
    alpha = np.asarray(Image.open(io.BytesIO(frames[0].png)))[..., -1]
    assert (alpha > 0).sum() == 4 * shown[0]  # 2x2 pixels a token, the others transparent


def test_the_counters_count_the_networks_calls(studio, names):
    (*_, teacher), (*_, student) = (list(studio.frames(studio.recipe(name, 0, 0, 4))) for name in names)
    assert (teacher.calls.context, teacher.calls.head, teacher.calls.tokens) == (4 * 2, 4 * 8, 16 * 8 * 2)
    assert (student.calls.context, student.calls.head, student.calls.tokens) == (4, 4, 16)


def test_models_draw_the_same_seeds_side_by_side_students_first(studio, names):
    seen = []
    for panels, told in actions.generate(studio, names, ["cross", "square"], 7, 3, 4, guidance=2.0):
        seen.append((told, [len(panel.pictures) for panel in panels]))
    assert [panel.served.name for panel in panels] == names
    assert [[(p.recipe.label, p.recipe.seed) for p in panel.pictures] for panel in panels] == [
        [(0, 7), (1, 8), (0, 9)]
    ] * 2
    assert panels[0].pictures[0].recipe.guidance == 2.0
    assert panels[1].pictures[0].recipe.guidance is None
    assert seen[-1][0].startswith("Done")
    assert any(counts == [0, 3] for _, counts in seen)  # the student was done before the teacher began
    html = views.panels(panels, actions.reference(panels))
    assert html.count("<img") == 2 * (3 + 4)  # pictures, and the last one's iterations
    assert len(re.findall(r"\d+× faster", html)) == 1


def test_a_saved_picture_is_drawn_again_exactly(studio, names, tmp_path):
    for name in names:
        (tmp_path / "a.png").write_bytes(studio.picture(studio.recipe(name, "cross", 11, 6)).png)
        recipe, given = read_recipe(tmp_path / "a.png")
        assert to_pil(redraw(recipe, find_pipelines(Path(names[0]).parent, "cpu"))).tobytes() == given.tobytes()


def test_an_edit_changes_what_is_painted_and_nothing_else(studio, names):
    desk = Desk().put(studio.picture(studio.recipe(names[1], "cross", 1, 4)))
    before = desk.picture
    *_, (after, frame, told) = actions.edit(studio, desk, [5, 6, 9], names[1], "square", 2, 4)
    assert frame is None
    assert "3 tokens redrawn, the other 13 bit-identical" in told
    changed = (after.picture.tokens != before.tokens).any(dim=1).nonzero().flatten().tolist()
    assert changed == [5, 6, 9]
    assert after.picture.recipe.iterations == 3  # no more than there are tokens
    assert after.undo().picture is before
    with pytest.raises(ValueError, match="nothing to take back"):
        after.undo().undo()


def test_an_upload_is_encoded_once_and_its_other_pixels_stay(studio, names, tmp_path):
    desk = Desk().put(studio.upload(content(photo()), names[1]))
    original = np.asarray(to_pil(desk.picture.image))
    for tokens in ([0], [15]):
        *_, (desk, _, _) = actions.edit(studio, desk, tokens, names[1], "cross", 3, 8)
    result = np.asarray(to_pil(desk.picture.image))
    same = result == original
    assert same[2:6].all()
    assert same[:2, 2:].all()
    assert not same[:2, :2].all()
    assert not same[6:, 6:].all()
    (tmp_path / "a.png").write_bytes(desk.picture.png)  # the recipe holds the upload
    recipe, given = read_recipe(tmp_path / "a.png")
    assert to_pil(redraw(recipe, find_pipelines(Path(names[0]).parent, "cpu"))).tobytes() == given.tobytes()


def test_a_picture_is_edited_no_more_often_than_its_recipe_can_say(studio, names, tmp_path):
    desk = Desk().put(studio.picture(studio.recipe(names[1], "cross", 1, 4)))
    for i in range(LONGEST - 1):
        *_, (desk, _, _) = actions.edit(studio, desk, [i % 16], names[1], "cross", i, 1)
    (tmp_path / "a.png").write_bytes(desk.picture.png)
    recipe, given = read_recipe(tmp_path / "a.png")
    assert to_pil(redraw(recipe, find_pipelines(Path(names[0]).parent, "cpu"))).tobytes() == given.tobytes()
    with pytest.raises(ValueError, match="save this picture and upload it"):
        next(actions.edit(studio, desk, [0], names[1], "cross", 0, 1))


def test_an_upload_as_it_came_is_said_to_have_no_recipe(studio, names):
    picture = studio.upload(content(photo()), names[1])
    assert "an upload has no recipe until a part of it is redrawn" in views.saving(picture)
    drawn = studio.picture(studio.recipe(names[1], "cross", 1, 4))
    assert "with its recipe" in views.saving(drawn)


def test_variations_keep_a_share(studio, names):
    desk = Desk().put(studio.picture(studio.recipe(names[1], "cross", 1, 4)))
    *_, (varied, _, told) = actions.vary(studio, desk, 0.75, 3, names[1], "cross", 20, 4)
    assert "12 tokens" in told
    redrawn = [picture.recipe.redrawn for picture in varied]
    assert all(len(positions) == 4 for positions in redrawn)
    assert len(set(redrawn)) > 1
    for picture in varied:
        kept = [i for i in range(16) if i not in picture.recipe.redrawn]
        assert torch.equal(picture.tokens[kept], desk.picture.tokens[kept])
        assert not torch.equal(picture.tokens, desk.picture.tokens)


def test_the_comparison_fills_a_grid(studio, names):
    *_, (found, _told) = actions.compare(studio, names, "square", 3, [4, 1, 2])
    assert (found.columns, found.rows) == ([1, 2, 4], names)
    assert {at: picture.recipe.iterations for at, picture in found.cells.items()} == {
        (i, j): k for i in range(2) for j, k in enumerate((1, 2, 4))
    }
    rows = [(name, "red") for name in names]
    html = views.compare_table(found.columns, rows, found.cells)
    assert html.count("<img") == 6
    assert "K = 4" in html


def test_bundled_figures_are_those_of_the_results():
    header, rows = bundled.tuning_rows()
    assert header[:2] == ["model", "K"]
    pairs = {row[1] for row in rows}
    assert {"4", "8"} <= pairs
    for k in pairs:
        before, after = ([float(cell) for cell in row[2:]] for row in rows if row[1] == k)
        assert after[0] > before[0]  # the tuned reward, and the held-out one
        assert after[1] > before[1]
    points = bundled.quality_points()
    assert next(iter(points)) == "fashion-teacher"
    slow, fast = points["fashion-teacher"], points["fashion-student"]
    assert [k for _, _, k in slow] == [4, 6, 8, 16, 32]
    assert all(a[0] > 10 * b[0] for a, b in zip(slow, fast, strict=True))
    assert views.plot(points, "x", "y").count("<circle") == 15


REFUSED = [
    ({"models": []}, "at least one model"),
    ({"models": ["no such"]}, "no model 'no such'"),
    ({"classes": []}, "at least one class"),
    ({"classes": ["circle"]}, "no class 'circle'"),
    ({"seed": -1}, "0 to 999999"),
    ({"seed": LAST_SEED}, "0 to 999999"),  # the second picture's
    ({"seed": 0.5}, "0 to 999999"),
    ({"seed": "1"}, "0 to 999999"),
    ({"seed": float("nan")}, "0 to 999999"),
    ({"count": 9}, "1 to 8"),
    ({"iterations": 17}, "1 to 16"),
    ({"iterations": 0}, "1 to 16"),
    ({"guidance": float("inf")}, "guidance"),
    ({"order": "spiral"}, "spiral"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=str)
def test_what_is_out_of_range_is_refused_before_anything_is_drawn(studio, names, change, message):
    given = {
        "models": names, "classes": ["cross"], "seed": 0, "count": 2, "iterations": 4, "guidance": 1.5, "order": None,
        **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        next(actions.generate(studio, *given.values()))


@pytest.mark.parametrize("tokens", [[], [16], [-1], [1.5], ["1"], None])
def test_bad_masks_are_refused(studio, names, tokens):
    desk = Desk().put(studio.picture(studio.recipe(names[1], "cross", 1, 4)))
    with pytest.raises(ValueError, match="token"):
        next(actions.edit(studio, desk, tokens, names[1], "cross", 0, 4))
    with pytest.raises(ValueError, match="draw or upload"):
        next(actions.edit(studio, Desk(), [1], names[1], "cross", 0, 4))
    with pytest.raises(ValueError, match="0 to 1"):
        next(actions.vary(studio, desk, 1.5, 2, names[1], "cross", 0, 4))


def bomb():
    """A PNG of 100,000 x 100,000 pixels in a few hundred bytes."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def animation(format):
    frames = [photo(), photo((30, 20)).rotate(180)]
    return content(frames[0], format, save_all=True, append_images=frames[1:], duration=100)


BAD_FILES = [
    (b"hello", "cannot be read"),
    (b"", "cannot be read"),
    (content(photo())[:200], "cannot be read"),
    (b"%PDF-1.4 " + bytes(100), "cannot be read"),
    (bytes(UPLOAD_BYTES + 1), "at most 5 MB"),
    (animation("GIF"), "animation"),
    (animation("WEBP"), "animation"),
    (animation("PNG"), "animation"),
    (bomb(), "pixels"),
    (content(Image.new("1", (6000, 6000))), "6000x6000 pixels"),
]


@pytest.mark.parametrize(("file", "message"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_bad_uploads_are_refused_with_a_friendly_message(studio, names, file, message):
    with pytest.raises(ValueError, match=message):
        studio.upload(file, names[1])


@pytest.mark.parametrize(
    "file",
    [
        content(photo(), "JPEG"), content(photo(), "WEBP"), content(photo(), "GIF"), content(photo((300, 7))),
        content(Image.new("RGBA", (9, 9))), content(Image.new("P", (9, 9))), content(Image.new("I;16", (9, 9))),
    ],
    ids=["jpeg", "webp", "gif", "wide", "alpha", "palette", "deep"],
)  # fmt: skip
def test_good_uploads_become_tokens(studio, names, file):
    picture = studio.upload(file, names[1])
    assert picture.tokens.shape == (16, 4)
    assert picture.image.shape == (1, 8, 8)


def test_transparency_is_white():
    assert read_upload(content(Image.new("RGBA", (4, 4), (9, 0, 0, 0))), 8).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_threads_each_get_their_picture(studio, names):
    wanted = {seed: studio.picture(studio.recipe(names[seed % 2], seed % 2, seed, 4)).image for seed in range(16)}
    got = {}

    def visit(seed):
        got[seed] = studio.picture(studio.recipe(names[seed % 2], seed % 2, seed, 4)).image

    threads = [threading.Thread(target=visit, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[seed], wanted[seed]) for seed in range(16))


def test_who_leaves_stops_the_drawing(studio, names):
    frames = studio.frames(studio.recipe(names[0], 0, 0, 16))
    next(frames)
    frames.close()
    studio.worker.submit(int).result()  # the drawing thread is free again
    assert studio.served(names[0]).calls.head < 16 * 8


def test_who_left_before_the_turn_costs_nothing(studio, names):
    """A drawing that was abandoned while others were drawn does not begin: not even its first iteration is computed."""
    hold, here = threading.Event(), [True]
    studio.worker.submit(hold.wait)  # somebody else is drawing
    reset = STAYS.set(lambda: here[0])
    calls = studio.served(names[0]).calls
    frames = studio.frames(studio.recipe(names[0], 0, 0, 16))
    threading.Timer(0.2, lambda: here.insert(0, False)).start()
    try:
        with pytest.raises(ValueError, match="nobody waits for this picture any more"):
            next(frames)
    finally:
        STAYS.reset(reset)
        hold.set()
    studio.worker.submit(int).result()
    assert studio.served(names[0]).calls is calls  # no drawing began to count


def test_times_hold_what_an_accelerator_still_has_to_do(studio, names, monkeypatch):
    """Waiting for the device, here 50 ms an iteration, is part of the drawing and not of showing it."""
    monkeypatch.setattr("marval.page.studio.synchronize", lambda device: time.sleep(0.05))
    frames = list(studio.frames(studio.recipe(names[1], 0, 0, 4)))
    for before, after in itertools.pairwise(frames):
        assert after.seconds - before.seconds >= 0.05
    assert frames[-1].picture.seconds >= 4 * 0.05


def test_a_variation_can_be_taken_while_others_are_drawn(studio, names):
    """What is shown is on the desk at every moment, also where the drawing is stopped."""
    desk = Desk().put(studio.picture(studio.recipe(names[1], "cross", 1, 4)))
    on = Editing(studio)
    for kept, _, _, cells, _ in on.variations(desk, 0.5, 3, names[1], "cross", 0, 4):
        assert len(kept.varied) == cells.count("data-picture")
        if kept.varied:
            shown = on.choose(kept, names[1], EventData(None, {"picture": f"0:{len(kept.varied) - 1}"}))
            assert shown[0].picture is kept.varied[-1]
            assert shown[0].past[-1] is desk.picture
    assert len(kept.varied) == 3


def test_a_name_cannot_smuggle_html(studio, names):
    assert "<script>" not in views.status("<script>alert(1)</script>")
    assert "<script>" not in views.figures_table(["<script>"], [["<script>"]], "<script>")
