"""The page without its server: drawing, editing, varying, uploads, and what is refused."""

import base64
import dataclasses
import io
import itertools
import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from marval.config import OneStep, PixelSpace
from marval.io.checkpoint import save_model
from marval.io.images import to_pil
from marval.model import MAR
from marval.page.studio import SHOWING, Studio, Wanted
from marval.recipe import find_pipelines, read_recipe, redraw
from marval.runtime.rng import generator
from marval.sampling.graphs import Graphs
from tiny import tiny_config, tiny_model
from uploads import BAD_FILES, content, photo


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
    return Studio(names, "cpu")


@pytest.fixture(scope="module")
def draw(studio, names):
    """Draws one picture of the student, but for what is given: its events, the picture the last one."""

    def run(**given):
        events = []
        wanted = {"model": names[1], "class": "cross", "iterations": 4, **given}
        last = studio.draw(studio.job(Wanted.from_json(json.loads(json.dumps(wanted)))), events.append)
        return [*events, last]

    return run


def pixels(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def tokens(picture):
    return np.frombuffer(base64.b64decode(picture["tokens"]), "<f4").reshape(16, 4)


def changed(before, after):
    return set((tokens(before) != tokens(after)).any(axis=1).nonzero()[0])


def drawn_again(picture, names, folder):
    """Whether a saved picture's recipe draws it again."""
    (folder / "a.png").write_bytes(base64.b64decode(picture["png"]))
    recipe, given = read_recipe(folder / "a.png")
    return to_pil(redraw(recipe, find_pipelines(Path(names[0]).parent, "cpu"))).tobytes() == given.tobytes()


def test_each_event_holds_the_tokens_that_are_new(studio, names, draw):
    events = draw(seed=4, iterations=5)
    assert [event["iteration"] for event in events] == [1, 2, 3, 4, 5]
    assert [event["seconds"] for event in events] == sorted(event["seconds"] for event in events)
    patches = [pixels(event["patches"]) for event in events[:-1]]
    picture = pixels(events[-1]["picture"]["png"])
    alone = studio.served(names[1]).pipeline.sample(["cross"], seed=4, iterations=5)[0]
    assert np.array_equal(picture, np.asarray(to_pil(alone)))
    shown = np.stack([patch[..., -1] > 0 for patch in patches])
    assert (shown.sum(axis=0) <= 1).all()  # no token twice
    assert all(4 <= one.sum() < 64 and one.sum() % 4 == 0 for one in shown)  # whole tokens of 2x2 pixels
    for patch, one in zip(patches, shown, strict=True):
        assert np.array_equal(patch[..., 0][one], picture[one])
        assert not patch[..., 0][~one].any()  # nothing else, so that it stays small


def test_the_counters_count_the_networks_calls_where_graphs_would_hide_them(draw, names, monkeypatch):
    monkeypatch.setattr(Graphs, "serve", lambda self, tokens: self.work)  # as on a GPU
    for _ in range(3):  # a graph would be recorded at the second
        (*_, teacher), (*_, student) = (draw(model=name) for name in names)
        assert teacher["calls"] == {"context": 4 * 2, "head": 4 * 8, "tokens": 16 * 8 * 2}
        assert student["calls"] == {"context": 4, "head": 4, "tokens": 16}


def test_an_edit_changes_what_is_painted_and_nothing_else(draw, names, tmp_path):
    before = draw(seed=1)[-1]["picture"]
    (first, *_, last) = draw(seed=2, picture=before, redrawn=[9, 5, 6, 5], **{"class": "square"})
    assert set() < changed(before, last["picture"]) <= {5, 6, 9}
    assert last["iteration"] == 3  # no more than there are tokens
    assert (pixels(first["patches"])[..., -1] > 0).sum() == 4 * 14  # those that stay, and the first one
    assert last["picture"]["file"].endswith("-edited.png")
    assert drawn_again(last["picture"], names, tmp_path)


def test_variations_keep_a_share(draw):
    before = draw(seed=1)[-1]["picture"]
    varied = [draw(seed=seed, picture=before, keep=0.75)[-1]["picture"] for seed in (20, 21, 22)]
    redrawn = [picture["recipe"]["redrawn"] for picture in varied]
    assert all(changed(before, picture) <= set(some) for picture, some in zip(varied, redrawn, strict=True))
    assert [len(set(some)) for some in redrawn] == [4, 4, 4]
    assert len(set(map(tuple, redrawn))) > 1
    for keep, rest in ((1.0, 1), (0.0, 16)):
        assert len(draw(picture=before, keep=keep)[-1]["picture"]["recipe"]["redrawn"]) == rest


def test_an_upload_is_encoded_once_and_its_other_pixels_stay(studio, draw, names, tmp_path):
    picture = studio.upload(content(photo()), names[1])
    original = pixels(picture["png"])
    assert (picture["recipe"], picture["file"]) == (None, "upload.png")
    for position in (0, 15):
        picture = draw(seed=3, picture=picture, redrawn=[position])[-1]["picture"]
    same = pixels(picture["png"]) == original
    assert same[2:6].all()
    assert same[:2, 2:].all()
    assert not same[:2, :2].all()
    assert not same[6:, 6:].all()
    assert drawn_again(picture, names, tmp_path)  # the recipe holds the upload


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_uploads_are_refused_with_a_friendly_message(studio, names, name):
    file, message = BAD_FILES[name]
    with pytest.raises(ValueError, match=message):
        studio.upload(file, names[1])


TOKENS = base64.b64encode(bytes(256)).decode()
REFUSED = [
    ({"model": "no such"}, "no model 'no such'"),
    ({"class": "circle"}, "unknown class 'circle'"),
    ({"class": ["cross"]}, "class_name"),
    ({"seed": 10**6}, "0 to 999999"),
    ({"seed": True}, "0 to 999999"),
    ({"iterations": 17}, "17 iterations for 16 tokens"),
    ({"guidance": float("inf")}, "guidance"),
    ({"temperature": -1.0}, "temperature -1"),
    ({"order": "spiral"}, "spiral"),
    ({"reward": "os:getcwd"}, "unexpected keyword argument 'reward'"),
    ({"redrawn": [1]}, "draw or upload a picture first"),
    ({"keep": 0.5}, "draw or upload a picture first"),
    ({"redrawn": [1], "picture": {}}, "this is no picture"),
    ({"redrawn": [1], "picture": {"tokens": "?"}}, "base64"),
    ({"redrawn": [1], "picture": {"tokens": "AAAA"}}, "of another kind"),
    ({"redrawn": [1], "picture": {"tokens": TOKENS}}, "an edit needs"),
    ({"redrawn": [1], "picture": {"tokens": TOKENS, "recipe": 3}}, "not a recipe"),
    ({"redrawn": [16], "picture": {"tokens": TOKENS, "upload": ""}}, "0 to 15"),
    ({"redrawn": [], "picture": {"tokens": TOKENS, "upload": ""}}, "0 to 15"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_out_of_range_is_refused(studio, names, change, message):
    with pytest.raises(ValueError, match=message):
        studio.draw(studio.job(Wanted.from_json({"model": names[0], "class": "cross", **change})))


def test_times_hold_what_an_accelerator_still_has_to_do(draw, monkeypatch):
    """Waiting for the device, here 50 ms an iteration, is part of the drawing and not of showing it."""
    monkeypatch.setattr("marval.page.studio.synchronize", lambda device: time.sleep(0.05))
    events = draw()
    for before, after in itertools.pairwise(events):
        assert after["seconds"] - before["seconds"] >= 0.049


def test_a_large_models_picture_is_not_decoded_more_often_than_drawing_allows(studio, names, draw, monkeypatch):
    """With a slow VAE, moments come without patches; what they lack comes with the next ones."""
    space = studio.served(names[1]).pipeline.space
    decode = space.decode
    monkeypatch.setattr(space, "decode", lambda tokens: (time.sleep(0.3), decode(tokens))[1])
    began = time.perf_counter()
    events = draw(iterations=16)
    taken = time.perf_counter() - began
    shown = [event for event in events if "patches" in event]
    assert events[0] in shown
    assert 0.3 * (len(shown) - 1) <= 0.5 + SHOWING * taken  # one more may begin within the limit
    opaque = [int((pixels(event["patches"])[..., -1] > 0).sum()) for event in shown]
    assert sum(opaque) == shown[-1]["iteration"] * opaque[0]  # 16 tokens in 16 iterations
    assert events[-1]["seconds"] < taken - 0.3 * len(shown)  # which does not count as drawing


def test_a_picture_of_256_pixels_in_64_iterations_is_sent_once(tmp_path):
    """What the page gets while a large picture is drawn is not many times the picture."""
    space = PixelSpace((256, 256), 3, 16, shift=0.5, scale=2.0)
    mar = dataclasses.replace(tiny_config().mar, token_grid=(16, 16), token_dim=768)
    config = dataclasses.replace(tiny_config(), space=space, mar=mar, draw=OneStep(clip=True))
    save_model(tmp_path, MAR(mar).initialize(generator(0)), config)
    studio, events = Studio([str(tmp_path)], "cpu"), []
    last = studio.draw(studio.job(Wanted(str(tmp_path), "cross", iterations=64)), events.append)
    assert len(events) == 63
    sent = sum(len(json.dumps(event)) for event in events)
    assert sent < 2 * len(json.dumps(last["picture"]["png"])) + 63 * 1000
