"""The emoji data set, made from small packages instead of npm's."""

import base64
import csv
import hashlib
import io
import json
import runpy
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

SCRIPT = Path(__file__).parents[2] / "examples/emoji/make_dataset.py"
FIRST = 0x1F400  # code points of made-up animals
COUNT = 60


def drawing(kind, side, colour):
    """A disc of a colour, off the centre of a transparent picture, as the bytes of a file."""
    image = Image.new("RGBA", (side, side))
    ImageDraw.Draw(image).ellipse((side // 8, side // 4, side // 2, side * 5 // 8), fill=colour)
    image.save(content := io.BytesIO(), kind, lossless=True)
    return content.getvalue()


def entry(number, **others):
    """What emoji.json says of an animal."""
    code = f"{FIRST + number:X}"
    names = {
        "name": f"ANIMAL {number}",
        "short_name": f"animal{number}",
        "short_names": [f"animal{number}", "an_animal"],
    }
    return {"unified": code, "subcategory": "animal-mammal", "sort_order": COUNT - number, **names, **others}


def packages():
    """The files of four packages: the fourth animal has no 3d drawing, and the fifth only a flat one."""
    animals = [entry(number) for number in range(COUNT)]
    animals[0]["unified"] += "-FE0F"
    unwanted = [
        entry(100, subcategory="country-flag"), entry(101, short_name="clock12"),
        entry(102, unified="1F468-200D-1F33E"), entry(103, short_name="hearts"),
    ]  # fmt: skip
    codes = [f"{FIRST + number:x}" for number in [*range(COUNT), *range(100, 104)]]
    words = {chr(FIRST): {"tts": ["red fox: sly’s"], "default": ["animal", "sly", "a|b"]}}
    words |= {chr(FIRST + 1): {"tts": ["dog"], "default": ["animal", "pet"]}}
    flat = {f"img/twitter/64/{code}.png": drawing("png", 64, "blue") for code in codes}
    return {
        "3d": {f"assets/{code}.webp": drawing("webp", 256, "red") for code in codes if code not in codes[3:5]},
        "cartoon": {f"img/google/64/{code}.png": drawing("png", 64, "green") for code in codes if code != codes[4]},
        "flat": flat | {"emoji.json": json.dumps(animals + unwanted).encode()},
        "words": {"annotations/en/annotations.json": json.dumps({"annotations": {"annotations": words}}).encode()},
    }


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A folder that serves as npm's registry, and the script that knows its packages; no list of concepts is needed."""
    script = runpy.run_path(str(SCRIPT))
    known = {**script["STYLES"], "words": script["ANNOTATIONS"]}
    for name, files in packages().items():
        tarball = tmp_path / "registry" / known[name].path
        tarball.parent.mkdir(parents=True)
        with tarfile.open(tarball, "w:gz") as archive:
            for path, content in files.items():
                member = tarfile.TarInfo(f"package/{path}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        sha512 = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
        object.__setattr__(known[name], "sha512", sha512)
    monkeypatch.setenv("npm_config_registry", (tmp_path / "registry").as_uri())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    script["main"].__globals__["HERE"] = tmp_path
    (tmp_path / "concepts.txt").write_text("# two\nred fox with sly's: fox, reynard\n\ndog\n")
    (tmp_path / "LICENSES.md").write_text("free")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["make_dataset.py", str(tmp_path / "out"), *words])
        script["main"]()
        with (tmp_path / "out" / "captions.csv").open(encoding="utf-8") as file:
            return list(csv.DictReader(file))

    return tmp_path, run


def test_every_wanted_emoji_is_drawn_in_each_style_that_has_it(registry):
    folder, run = registry
    rows = run("--size", "64")
    assert len(rows) == 3 * COUNT - 1 - 3  # the fourth has two drawings, the fifth none that counts
    assert rows[-1]["concept"] == "red fox with sly's"  # in Unicode's order
    assert len({row["file_name"] for row in rows}) == len(rows) == len(list((folder / "out").glob("*/*.png")))
    assert (folder / "out/LICENSES.md").read_text() == "free"
    assert Image.open(folder / "out" / rows[0]["file_name"]).size == (64, 64)


def test_drawings_are_centred_on_white_in_the_same_frame(registry):
    folder, run = registry
    run()
    for style, colour in {"3d": (255, 0, 0), "cartoon": (0, 128, 0), "flat": (0, 0, 255)}.items():
        image = Image.open(folder / "out" / style / "red-fox-with-sly-s.png")
        assert (image.mode, image.size) == ("RGB", (32, 32))
        pixels = np.array(image).astype(int)
        assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
        assert np.abs(pixels[16, 16] - colour).max() <= 2
        drawn = (pixels < 128).any(axis=2)
        assert [side.nonzero()[0][[0, -1]].tolist() for side in (drawn.any(0), drawn.any(1))] == [[1, 30], [1, 30]]
        assert np.abs(pixels - pixels[:, ::-1]).max() < 90  # only by how the source cut the disc into pixels


def test_captions_are_the_name_those_of_the_list_short_names_and_common_keywords(registry):
    folder, run = registry
    captions = {row["concept"]: row["caption"].split("|") for row in run("--concepts", str(folder / "concepts.txt"))}
    assert captions == {
        "red fox with sly's": ["red fox with sly's", "fox", "reynard", "an animal", "red fox with sly's, animal"],
        "dog": ["dog", "dog, animal"],
    }


def test_a_tenth_is_held_out_never_two_of_one_concept_and_always_the_same(registry):
    folder, run = registry
    every = {(row["concept"], row["style"]): row["split"] for row in run()}
    held_out = [concept for (concept, _), split in every.items() if split == "held-out"]
    assert len(set(held_out)) == len(held_out)
    assert 0.05 * len(every) < len(held_out) < 0.15 * len(every)
    assert set(every.values()) == {"train", "held-out"}
    (folder / "out").rename(folder / "every")
    few = {(row["concept"], row["style"]): row["split"] for row in run("--concepts", str(folder / "concepts.txt"))}
    assert few == {pair: every[pair] for pair in few}


def test_other_packages_and_folders_and_names_are_refused(registry, capsys):
    folder, run = registry
    (folder / "animals.txt").write_text("dragon\n")
    with pytest.raises(SystemExit) as exit_code:
        run("--concepts", str(folder / "animals.txt"))
    assert exit_code.value.code == 2
    assert "no emoji is called dragon" in capsys.readouterr().err
    tarball = next((folder / "cache/marval/emoji").glob("emoji-datasource-google-*.tgz"))
    tarball.write_bytes(b"another")
    with pytest.raises(SystemExit):
        run()
    assert f"{tarball} has the SHA-512" in capsys.readouterr().err
    tarball.unlink()
    for served in (folder / "registry").glob("emoji-datasource-google/-/*"):
        served.unlink()
    with pytest.raises(SystemExit):
        run()
    assert "cannot fetch file://" in capsys.readouterr().err
    assert not (folder / "out").exists()
    (folder / "out").mkdir()
    with pytest.raises(SystemExit):
        run()
    assert "is there already" in capsys.readouterr().err
