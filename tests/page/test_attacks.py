"""Files of strangers who mean harm: what each of them meets, exactly."""

import base64
import dataclasses
import json
import os
import re
import zlib

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from marval.io.checkpoint import WEIGHTS, model_hash, save_model
from marval.pipeline import load
from marval.recipe import KEY, make_recipe
from tiny import tiny_config, tiny_model
from uploads import chunk, content, png_of


@pytest.fixture
def like(refusal, unchecked, tmp_path):
    """Draw like a picture with this recipe; the one line that refuses it."""

    def run(text, *model):
        notes = PngInfo()
        notes.add_itxt(KEY, text if isinstance(text, str) else json.dumps(text))
        Image.new("L", (8, 8)).save(tmp_path / "a.png", pnginfo=notes)
        said = refusal("sample", *model, "--like", "a.png", "--device", "cpu")
        assert len(said) < 1000
        return said

    return run


@pytest.fixture
def recipe(folder):
    """A sound recipe of the tiny teacher, as JSON."""
    return json.loads(make_recipe("mine", model_hash(folder), load(folder), 0, 5, 4).to_json())


@pytest.mark.parametrize("name", ["/dev/zero", "/etc", "fifo", "//host/share", "..", "mine", ""])
def test_a_path_in_a_picture_is_never_opened(like, tmp_path, folder, recipe, name):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "mine").symlink_to(folder)  # even where it is sound
    assert re.search("no model here has the weights.*MODEL --like", like({**recipe, "model": name}))
    assert not (tmp_path / "samples").exists()


def test_a_folder_with_a_bundled_models_name_is_not_taken_for_it(like, tmp_path, folder, recipe):
    (tmp_path / "fashion-student").symlink_to(folder)
    assert "no model here has the weights" in like({**recipe, "model": "fashion-student"})


def nested(depth):
    return '{"before":' * depth + "{}" + "}" * depth


MALFORMED = [
    ({"seed": 10**30}, "seed 1000000"),
    ({"K": 10**9}, "1000000000 iterations for 16 tokens"),
    ({"T": 10**9}, "1000000000"),
    ({"w": float("nan")}, "guidance nan"),
    ({"label": -1}, "-1"),
    ({"order": ["random"]}, "order ['random']"),
    ({"redrawn": [10**9], "upload": base64.b64encode(content(Image.new("L", (8, 8)))).decode()}, "numbered 0 to 15"),
    ({"redrawn": [0], "upload": base64.b64encode(b"hello").decode()}, "the upload in the recipe is damaged"),
    ({"redrawn": [0], "upload": base64.b64encode(png_of(12_000, 12_000)).decode()}, "12000x12000 pixels"),
    ({"redrawn": [0]}, "an edit needs"),
    ({"dtype": "load"}, "dtype"),
    ({"reward": "os:getcwd"}, "not a recipe"),  # no file may name code
    ("1" * 5000, "not a recipe"),
    ("", "not a recipe"),
    (nested(500), "expected at most 100 edits"),
    (nested(100_000), "not a recipe"),
]


@pytest.mark.parametrize(("change", "message"), MALFORMED, ids=range(len(MALFORMED)))
def test_every_malformed_recipe_is_one_line(like, folder, recipe, change, message):
    text = change if isinstance(change, str) else {**recipe, **change}
    assert ("a.png" if message == "not a recipe" else message) in like(text, folder)


PICTURES = [
    png_of(100_000, 100_000),
    png_of(8, 8, chunk(b"iTXt", b"marval\0\1\0\0\0" + zlib.compress(bytes(50_000_000)))),
    png_of(8, 8, *[chunk(b"tEXt", b"marval\0" + b"a" * 1_000_000)] * 70),
    content(Image.new("L", (8, 8)), "GIF"),
]


@pytest.mark.parametrize("picture", PICTURES, ids=range(len(PICTURES)))
def test_every_malformed_picture_is_one_line(refusal, tmp_path, picture):
    (tmp_path / "a.png").write_bytes(picture)
    assert "a.png cannot be read as a PNG" in refusal("sample", "--like", "a.png")


def test_what_is_no_file_is_not_read(refusal, like, tmp_path, recipe):
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "fifo.png")
    for name in ("fifo.png", "folder.png", "nothing.png"):
        assert f"{name} does not exist, or is no file" in refusal("sample", "--like", name)
    (tmp_path / "unfinished").mkdir()  # a run's folder in which there is no model yet
    assert "no model here has the weights" in like(recipe, "unfinished")
    os.mkfifo(tmp_path / "unfinished" / WEIGHTS)
    assert "does not exist, or is no file" in refusal("sample", "unfinished")


def test_a_class_cannot_name_another_folder(marval, tmp_path):
    names = ["../../elsewhere", "..\\a\nb" + "c" * 300]
    save_model(tmp_path / "model", tiny_model(), dataclasses.replace(tiny_config(), class_names=tuple(names)))
    marval("sample", "model", "--count", 2, "--iterations", 1, "--device", "cpu")
    found = sorted(file.name for file in (tmp_path / "samples").iterdir())
    assert found == ["00000-..-..-elsewhere-0.png", f"00001-..-a-b{'c' * 34}-1.png", "grid.png"]
