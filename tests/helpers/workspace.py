"""A folder with tiny models and pictures, and marval run in this process: fixtures for tests of commands."""

import dataclasses
import functools
import sys

import pytest
from PIL import Image

from marval.config import OneStep
from marval.pipeline import Pipeline
from tiny import tiny_config, tiny_data, tiny_model

FEATURES = "plain_features:rows"
CODE = """
def rows(images): return images.float().mean(dim=(1, 3))
def flat(images): return images.float().flatten()
def bright(images, prompts):
    with open('scored', 'a') as file:
        file.write(len(images) * '.')
    return images.mean(dim=(1, 2, 3))
"""


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder with a tiny teacher and student, pictures of their two classes, and code that costs nothing."""
    data = tiny_data()
    for i, (image, label) in enumerate(zip(data.images[:16], data.labels[:16].tolist(), strict=True)):
        folder = tmp_path / "pictures" / data.class_names[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder / f"{i}.png")
    config = dataclasses.replace(tiny_config(), data="folder:pictures")
    student = dataclasses.replace(config, draw=OneStep(), name="student")
    Pipeline(tiny_model(), config).save(tmp_path / "teacher")
    Pipeline(tiny_model(), student).save(tmp_path / "student")
    Pipeline(tiny_model(1), student).save(tmp_path / "impostor")
    (tmp_path / "plain_features.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("plain_features", None)


@pytest.fixture
def run(workspace, marval):
    """marval in this process and that folder: exit code, standard output, standard error."""
    return functools.partial(marval, code=None)


def refused(result, *words):
    """Check that a command ended with exit code 2 and one line that holds these words."""
    code, _, error = result
    assert code == 2
    assert error.count("\n") == 1, error
    assert all(word in error for word in words), error
