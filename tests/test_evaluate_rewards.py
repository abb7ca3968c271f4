"""`marval evaluate --rewards`: rewards over class-name prompts, on tiny models."""

import json

import pytest
import torch

from marval.config import OneStep
from marval.evaluate.images import draw_bytes
from marval.evaluate.rewards import evaluate_rewards
from processes import marval, refused
from processes import marval as processes_marval
from test_evaluate import tiny_pipeline


def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))


def length(images, prompts):
    return torch.tensor([float(len(prompt)) for prompt in prompts])


def test_rewards_are_recorded_with_images_prompts_and_seeds_and_not_scored_twice(tmp_path):
    pipeline, folder, out = tiny_pipeline(OneStep()), tmp_path / "model", tmp_path / "rewards.json"
    pipeline.save(folder)
    calls: list[int] = []

    def counted(images, prompts):
        calls.append(len(images))
        return brightness(images, prompts)

    run = {"prompt": "one {}", "iterations": (3,), "samples": 7, "out": out, "seeds": (2,), "report": lambda line: None}
    evaluate_rewards([(folder, pipeline)], {"bright": counted}, **run)
    evaluate_rewards([(folder, pipeline)], {"bright": counted, "length": length}, **run)
    assert calls == [7]
    results = json.loads(out.read_text())["rewards"]
    (row,) = results["rows"]
    assert (row["samples"], row["prompts"], row["seeds"], row["first_seed"]) == (7, 2, 7, 2_000_000)
    assert (row["prompt"], row["iterations"], row["model"]) == ("one {}", 3, "tiny")
    assert {"command", "commit", "torch", "seed"} <= set(results)
    images, labels = draw_bytes(pipeline, 7, 3, seed=2)
    expected = (images.float() / 255).mean(dim=(1, 2, 3))
    assert row["rewards"]["bright"]["mean"] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert row["rewards"]["bright"]["standard_error"] == pytest.approx(expected.std().item() / 7**0.5, rel=1e-2)
    names = [len("one " + pipeline.config.class_names[label]) for label in labels]
    assert row["rewards"]["length"]["mean"] == pytest.approx(sum(names) / 7, rel=1e-5)

    again = evaluate_rewards([(folder, pipeline)], {"bright": brightness}, **{**run, "seeds": (2, 3)})
    assert len(again) == 2

    with pytest.raises(ValueError, match="where the class"):
        evaluate_rewards([(folder, pipeline)], {"bright": brightness}, **{**run, "prompt": "one"})
    tiny_pipeline(OneStep(), seed=1).save(folder)
    with pytest.raises(ValueError, match="other weights"):
        evaluate_rewards([(folder, pipeline)], {"bright": brightness}, **run)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny teacher on Fashion-MNIST's pixels, and its student."""
    import dataclasses

    from marval.config import Chain, MARConfig, ModelConfig, PixelSpace
    from marval.data import FASHION_CLASSES
    from marval.model import MAR
    from marval.pipeline import Pipeline
    from marval.runtime.rng import generator

    root = tmp_path_factory.mktemp("rewards")
    space = PixelSpace((28, 28), 1, 7, shift=0.3, scale=3.0)
    mar = MARConfig(
        space.token_grid, space.token_dim, 10, 16, 1, 2, 16, 1, 2, 16, 1, buffer_size=2, learn_variance=False
    )
    model = MAR(mar).initialize(generator(0, "tiny")).eval()
    for parameter in model.head.final_layer.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator("head"))
    config = ModelConfig(
        mar, space, Chain(1.5, diffusion_steps=8, clip=True), FASHION_CLASSES, 2, "tiny", "fashion-mnist"
    )
    Pipeline(model, config).save(root / "teacher")
    Pipeline(model, dataclasses.replace(config, draw=OneStep(clip=True), name="student")).save(root / "student")
    return root


def test_evaluate_measures_rewards_by_name_and_two_processes_find_what_one_does(work):
    result = marval("evaluate", "student", "--rewards", "classifier,math:f", "--samples", 11, cwd=work)
    assert refused(result, "math has no function f")
    (work / "counted.py").write_text(
        "def dark(images, prompts):\n"
        "    with open('scored', 'a') as file:\n"
        "        file.write(len(images) * '.')\n"
        "    return -images.mean(dim=(1, 2, 3))\n"
    )
    found = []
    for processes in (1, 2):
        result = processes_marval(
            "evaluate", "student", "teacher", "--rewards", "classifier,counted:dark", "--samples", 11, "--seed", 0, 1,
            "--out", f"rewards-{processes}.json", cwd=work, processes=processes,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert (work / "scored").read_text() == "." * 11 * 4  # each image once: two models, two seeds
        (work / "scored").unlink()
        assert result.stdout.count("tiny K=2, T=8, w=1.5, seed 1: classifier -") == 1  # one process speaks
        found.append(json.loads((work / f"rewards-{processes}.json").read_text())["rewards"]["rows"])
        assert all(row.pop("made")["processes"] == processes for row in found[-1])
    assert found[0] == found[1]
    assert [(row["model"], row["seed"], row["samples"], row["prompts"]) for row in found[0]] == [
        ("student", 0, 11, 10), ("student", 1, 11, 10), ("tiny", 0, 11, 10), ("tiny", 1, 11, 10),
    ]  # fmt: skip
    assert all(row["rewards"]["classifier"]["mean"] < 0 for row in found[0])
