"""Prompts: how they are read, and that one draws the same as its label and as its vector."""

import pytest
import torch

from marval.io.images import to_pil
from marval.pipeline import Pipeline
from marval.text import TextPrompt, alike, nearest_prompts, read_prompt
from texts import embedding, text_config, text_model


@pytest.fixture
def pipeline():
    """A tiny model of text."""
    return Pipeline(text_model(), text_config())


@pytest.mark.parametrize(
    ("item", "prompt", "name"),
    [
        ("shark", TextPrompt("shark", 0, 0), "shark, 3d style"),
        ("  The  SHARK", TextPrompt("shark", 0, 0), "shark, 3d style"),
        ("a taxi, Flat style", TextPrompt("taxi", 1, 1), "taxi, flat style"),
        ("an apple, 3-D", TextPrompt("apple", 0, 2), "apple, 3d style"),
        ("taxi, yellow", TextPrompt("taxi, yellow", 0), "taxi, yellow, 3d style"),
        (", flat", TextPrompt(", flat", 0), ", flat, 3d style"),
        (5, TextPrompt("apple", 1, 2), "apple, flat style"),
    ],
)
def test_prompts_are_read_with_their_styles(item, prompt, name, pipeline):
    assert read_prompt(item, pipeline.config) == prompt
    assert prompt.name(pipeline.config) == name
    assert pipeline.named(item) == (prompt.label(pipeline.config), name)


def test_a_style_counts_where_the_prompt_names_none(pipeline):
    assert [pipeline.named(item, "FLAT")[1] for item in ("taxi", "taxi, 3d")] == ["taxi, flat style", "taxi, 3d style"]


def test_a_prompt_draws_what_its_label_and_its_vector_draw(pipeline, encoder):
    vectors = torch.cat(
        [torch.stack([embedding("taxi"), embedding("green taxi")]), torch.tensor([[0.0, 1]] * 2)], dim=1
    )
    expected = pipeline.sample(vectors, seed=[3, 4])
    for prompts in (["a taxi, flat style", "green taxi, flat"], [3, "green taxi, flat"]):
        torch.testing.assert_close(pipeline.sample(prompts, seed=[3, 4]), expected, atol=2e-3, rtol=0)
    other = pipeline.sample(["taxi, 3d", "taxi, flat"], seed=[3, 4])
    assert all(
        (one - two).abs().max() > 0.01 for one, two in zip(other, expected, strict=True)
    )  # style and words count
    assert pipeline(vectors, num_images=2, seed=[3, 9, 4, 9])[::2] == [*map(to_pil, expected)]
    assert pipeline.labels(["taxi, flat style"]) == [3]
    with pytest.raises(ValueError, match="prompt number 6: expected 0 to 5"):
        pipeline.sample([6])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a zebra on the moon", ["zebra", "crescent moon", "full moon"]),
        ("pizzas", ["pizza"]),
        ("my own Zebra", ["zebra"]),
        ("?", []),
    ],
)
def test_without_an_encoder_known_prompts_of_the_same_words_are_suggested(prompt, expected):
    known = ("rolling on the floor", "full moon", "crescent moon", "pizza", "zebra")
    assert set(alike(prompt, known)[: len(expected)]) == set(expected)


def test_the_nearest_known_prompts_are_those_of_like_meaning(pipeline, encoder):
    assert nearest_prompts("a rotten apple", pipeline.config, pipeline.model)[0] == "apple"
