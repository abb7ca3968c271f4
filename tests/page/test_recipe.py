"""Recipes: a picture is drawn again exactly from what its PNG says, and what is no recipe is refused."""

import base64
import dataclasses
import json
import shutil

import pytest
import torch
from PIL import Image

from marval.config import OneStep
from marval.io.checkpoint import model_hash, save_model
from marval.io.images import png_bytes, to_pil
from marval.pipeline import Pipeline
from marval.recipe import KEY, Recipe, draw_recipe, find_pipelines, make_recipe, read_recipe, redraw
from tiny import tiny_config, tiny_model


@pytest.fixture(scope="module")
def tiny(folder):
    return Pipeline(tiny_model(), tiny_config())


def edited(folder, pipeline):
    """A drawn picture, edited twice: its recipe and its tokens."""
    first = make_recipe(str(folder), model_hash(folder), pipeline, 0, 5, 4)
    tokens = draw_recipe(first, pipeline)
    second = dataclasses.replace(first, label=1, seed=9, iterations=2, redrawn=(3, 7, 8), before=first)
    tokens = draw_recipe(second, pipeline, tokens)
    third = dataclasses.replace(first, order="raster", iterations=1, redrawn=(0,), before=second)
    return third, draw_recipe(third, pipeline, tokens)


def test_an_edited_picture_is_drawn_again_exactly(folder, tiny, tmp_path):
    recipe, tokens = edited(folder, tiny)
    picture = to_pil(tiny.space.decode(tokens[None])[0])
    (tmp_path / "a.png").write_bytes(png_bytes(picture, {KEY: recipe.to_json()}))
    found, given = read_recipe(tmp_path / "a.png")
    assert found == recipe
    assert len(found.history) == 3
    again = to_pil(redraw(found, find_pipelines(folder, "cpu")))
    assert again.tobytes() == given.tobytes() == picture.tobytes()
    plain = json.loads(recipe.to_json())
    assert (plain["class"], plain["seed"], plain["K"], plain["w"], plain["T"]) == ("cross", 5, 1, 1.5, 8)  # for ever


def test_an_edited_upload_is_drawn_again_exactly(folder, tiny):
    picture = Image.effect_noise((8, 8), 90)
    first = make_recipe(str(folder), model_hash(folder), tiny, 1, 3, 2)
    recipe = dataclasses.replace(first, redrawn=(0, 1), upload=base64.b64encode(png_bytes(picture)).decode())
    again = to_pil(redraw(Recipe.from_json(recipe.to_json()), find_pipelines(folder, "cpu")))
    assert again.crop((0, 2, 8, 8)).tobytes() == picture.crop((0, 2, 8, 8)).tobytes()  # tokens 2, ... are untouched
    assert again.crop((4, 0, 8, 2)).tobytes() == picture.crop((4, 0, 8, 2)).tobytes()
    assert again.crop((0, 0, 4, 2)).tobytes() != picture.crop((0, 0, 4, 2)).tobytes()


def test_a_temperature_that_was_asked_for_is_kept_where_the_models_own_is_another(folder):
    config = dataclasses.replace(tiny_config(), draw=OneStep(temperature=0.8))
    student = Pipeline(tiny_model(), config).with_draw(temperature=1.0)
    assert make_recipe("mine", "", student, 0, 5, 4).temperature == 1.0


def test_each_edit_is_drawn_again_in_its_own_precision(folder, tiny):
    fast, find = Pipeline(tiny_model(), tiny_config()).to(dtype=torch.bfloat16), find_pipelines(folder, "cpu")
    first = make_recipe("mine", model_hash(folder), fast, 0, 5, 4)
    plain = dataclasses.replace(first, dtype="float32")
    assert json.loads(first.to_json())["dtype"] == "bfloat16"
    assert "dtype" not in json.loads(plain.to_json())  # nor in what was saved before precisions were recorded
    assert Recipe.from_json(first.to_json()) == first
    edit = dataclasses.replace(plain, seed=9, iterations=2, redrawn=(3, 7, 8), before=first)
    tokens = draw_recipe(edit, tiny, draw_recipe(first, fast))
    for recipe, expected in ((edit, tokens), (plain, draw_recipe(plain, tiny)), (first, draw_recipe(first, fast))):
        assert torch.equal(redraw(recipe, find), tiny.space.decode(expected[None])[0])
    assert not torch.equal(redraw(plain, find), redraw(first, find))


def test_other_weights_are_refused_and_a_moved_model_is_named(folder, tiny, tmp_path):
    recipe = make_recipe("gone", model_hash(folder), tiny, 0, 0, 2)
    with pytest.raises(ValueError, match=r"no model here has the weights .*: name its folder"):
        redraw(recipe, find_pipelines(None, "cpu"))
    assert redraw(recipe, find_pipelines(folder, "cpu")).shape == (1, 8, 8)
    save_model(tmp_path / "models" / "other", tiny_model(seed=1), tiny_config())
    for other in ("models/other", "models"):
        with pytest.raises(ValueError, match="no model here has the weights"):
            redraw(recipe, find_pipelines(tmp_path / other, "cpu"))
    shutil.copytree(folder, tmp_path / "models" / "run" / "model")
    assert redraw(recipe, find_pipelines(tmp_path / "models", "cpu")).shape == (1, 8, 8)  # one of several
