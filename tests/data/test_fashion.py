"""Fashion-MNIST is recognised by its content, wherever it is; a wrong answer tries the next place; a part ships."""

import gzip
import hashlib
import io
import struct
from pathlib import Path
from urllib.error import HTTPError

import pytest
import torch

from marval.data import FASHION_CLASSES, fashion, load_fashion_mnist, load_fashion_sample, load_images
from marval.evaluate.features import FASHION_STATISTICS, Statistics
from marval.evaluate.judge import data_hash
from marval.runtime.rng import generator

PIXELS = torch.randint(0, 256, (20, 28, 28), generator=generator("pixels"), dtype=torch.uint8).numpy()
CONTENT = {  # a small set in the files' format
    "train-images-idx3-ubyte": struct.pack(">4I", 0x803, 20, 28, 28) + PIXELS.tobytes(),
    "train-labels-idx1-ubyte": struct.pack(">2I", 0x801, 20) + bytes(i % 10 for i in range(20)),
}


@pytest.fixture
def places(tmp_path, monkeypatch):
    """The system's folder and the cache, both empty, for the small set."""
    folders = tmp_path / "share", tmp_path / "cache/marval/fashion-mnist"
    monkeypatch.setattr(fashion, "SHA256", {name: hashlib.sha256(x).hexdigest() for name, x in CONTENT.items()})
    monkeypatch.setattr(fashion, "PACKAGE", folders[0])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for folder in folders:
        folder.mkdir(parents=True)
    return folders


@pytest.fixture
def hosts(monkeypatch):
    """`hosts(answer, ...)`: what the addresses answer, in order: a function of the file's name, or an error."""

    def start(*answers):
        answer_of = dict(zip((f"http://host-{i}/" for i in range(len(answers))), answers, strict=True))
        monkeypatch.setattr(fashion, "URLS", tuple(answer_of))

        def urlopen(url, timeout):
            answer = answer_of[url[: url.rindex("/") + 1]]
            if isinstance(answer, Exception):
                raise answer
            return io.BytesIO(answer(Path(url).stem))

        monkeypatch.setattr("urllib.request.urlopen", urlopen)

    return start


def sound(name):
    return gzip.compress(CONTENT[name])


def cut(name):
    return sound(name)[:-30]


def page(name):
    return b"<!DOCTYPE html><title>Log in to this network</title>"


MISSING = HTTPError("url", 404, "Not Found", {}, None)


def whole(data):
    assert torch.equal(data.images[:, 0], torch.from_numpy(PIXELS))
    assert data.labels.tolist() == [i % 10 for i in range(20)]
    assert data.class_names == FASHION_CLASSES
    return True


def test_the_whole_set_has_the_published_content_and_what_ships_is_its_first_200_a_class(fashion_train, fashion_test):
    assert fashion_train.labels.bincount().tolist() == [6000] * 10
    assert fashion_test.labels.bincount().tolist() == [1000] * 10
    assert data_hash(fashion_train) == Statistics.load(FASHION_STATISTICS).data_sha256
    shipped = load_fashion_sample()
    rows = torch.cat([(fashion_train.labels == label).nonzero()[:200, 0] for label in range(10)])
    assert torch.equal(shipped.images, fashion_train.images[rows])
    assert torch.equal(shipped.labels, fashion_train.labels[rows])
    licence = Path(fashion.__file__).parents[1] / "assets/fashion-mnist-2000.txt"
    assert "The MIT License" in licence.read_text()


@pytest.mark.parametrize(
    ("suffix", "packed"), [("", False), ("", True), (".gz", True), (".gz", False)]
)  # as browsers do
def test_files_are_recognised_however_they_are_packed(places, tmp_path, packed, suffix):
    for name, content in CONTENT.items():
        (tmp_path / f"{name}{suffix}").write_bytes(gzip.compress(content, 1) if packed else content)
    assert whole(load_images(f"fashion-mnist:{tmp_path}"))


def test_every_wrong_answer_tries_the_next_place_and_what_is_fetched_is_kept(places, hosts, capsys):
    system, cache = places
    for name in CONTENT:
        (system / f"{name}.gz").write_bytes(cut(name))
        (cache / f"{name}.gz").write_bytes(page(name))
    with pytest.raises(ValueError, match="cannot find"):
        load_fashion_mnist(fetch=False)
    hosts(MISSING, page, cut, sound)
    assert whole(load_fashion_mnist())
    assert "Fetching" in capsys.readouterr().err
    hosts(MISSING)
    assert whole(load_fashion_mnist())
    assert "Fetching" not in capsys.readouterr().err


def test_the_error_names_every_place_what_is_wrong_with_it_and_what_to_do(places, hosts, tmp_path):
    (places[0] / "train-images-idx3-ubyte.gz").write_bytes(cut("train-images-idx3-ubyte"))
    hosts(MISSING, page)
    with pytest.raises(ValueError, match="cannot find Fashion-MNIST's train-images-idx3-ubyte") as caught:
        load_fashion_mnist()
    for words in (
        "ubyte.gz: Compressed file ended",
        "HTTP Error 404: Not Found",
        "http://host-1/train-images",
        "52 other",
    ):
        assert words in str(caught.value)
    assert f"put its four .gz files into {places[1]}" in str(caught.value)
    with pytest.raises(ValueError, match=f"no such file in {tmp_path}.* or put its four .gz files into {tmp_path}"):
        load_fashion_mnist(folder=tmp_path)  # the only place that is tried


def test_a_cache_that_cannot_be_written_to_still_serves(places, hosts):
    hosts(sound)
    places[1].rmdir()
    places[1].write_text("a file in the folder's place")
    assert whole(load_fashion_mnist())
