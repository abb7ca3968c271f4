"""Distances against float64 references, known answers, and results files that resume and refuse."""

import dataclasses
import json
import math

import numpy as np
import pytest
import scipy.linalg
import torch

from marval.config import Chain, OneStep
from marval.data import load_fashion_sample
from marval.evaluate.evaluate import Judge, evaluate, flops_per_image, time_models
from marval.evaluate.features import (
    Statistics,
    diversity_within_class,
    extract,
    frechet_distance,
)
from marval.evaluate.images import draw_bytes
from marval.pipeline import Pipeline
from marval.rewards import ClassifierReward, prompts_of
from marval.rewards.classifier import Classifier, load_classifier, save_classifier
from marval.rewards.efficientnet import EfficientNetFeatures
from marval.runtime.rng import generator
from tiny import tiny_config, tiny_model


@pytest.fixture(scope="module")
def network():
    return EfficientNetFeatures()


def tiny_pipeline(draw, seed=0):
    return Pipeline(tiny_model(seed), dataclasses.replace(tiny_config(), draw=draw))


def test_frechet_distance_equals_scipy_in_float64():
    rng = np.random.default_rng(0)
    real, drawn = rng.normal(size=(500, 12)), rng.normal(size=(300, 12)) @ rng.normal(size=(12, 12)) + 0.3
    difference = real.mean(0) - drawn.mean(0)
    first, second = np.cov(real, rowvar=False), np.cov(drawn, rowvar=False)
    root = scipy.linalg.sqrtm(first @ second).real
    expected = difference @ difference + np.trace(first + second - 2 * root)
    statistics = Statistics.of(torch.from_numpy(real).split(70))
    found = frechet_distance(torch.from_numpy(drawn), statistics)
    assert found == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(torch.from_numpy(real), statistics) == pytest.approx(0, abs=1e-6)


def test_statistics_come_back_from_disk_and_other_features_are_refused(tmp_path):
    features = torch.randn(200, 8, generator=generator("features"))
    statistics = Statistics.of([features])
    np.testing.assert_allclose(statistics.covariance, np.cov(features.double().numpy(), rowvar=False), rtol=1e-9)
    statistics.save(tmp_path / "s.safetensors")
    again = Statistics.load(tmp_path / "s.safetensors")
    assert again.count == 200
    torch.testing.assert_close(again.covariance, statistics.covariance, rtol=1e-6, atol=1e-7)
    from safetensors.torch import save_file

    save_file(
        {"mean": torch.zeros(3)}, tmp_path / "other.safetensors", metadata={"features": "Inception", "count": "1"}
    )
    with pytest.raises(ValueError, match="Inception"):
        Statistics.load(tmp_path / "other.safetensors")


def test_features_tell_real_images_from_blurred_ones_and_noise(network):
    some = load_fashion_sample().images
    real = Statistics.of([extract(network, some[::5])])
    images = some[1::10]
    blurred = torch.nn.functional.avg_pool2d(images.float(), 5, 1, 2).byte()
    noise = torch.randint(0, 256, images.shape, generator=generator("noise"), dtype=torch.uint8)
    distances = [frechet_distance(extract(network, x), real) for x in (images, blurred, noise)]
    assert distances[0] * 1.5 < distances[1]
    assert distances[1] * 1.5 < distances[2]


def test_gradients_reach_every_pixel_of_the_features(network):
    images = torch.rand(1, 1, 28, 28, generator=generator("pixels"), requires_grad=True)
    x = images.expand(-1, 3, -1, -1) * 255 - 127
    x = torch.nn.functional.interpolate(x / 128, (64, 64), mode="bilinear", antialias=True)
    network.net.extract_features(x).square().sum().backward()
    assert images.grad.isfinite().all()
    assert (images.grad != 0).all()


def test_diversity_is_the_mean_distance_within_a_class():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [10.0, 0.0], [10.0, 1.0]])
    assert diversity_within_class(features, torch.tensor([0, 0, 1, 1])) == pytest.approx((5 + 1) / 2)
    assert diversity_within_class(features, torch.tensor([0, 0, 1, 2])) == pytest.approx(5)  # one image has no pair
    assert math.isnan(diversity_within_class(features, torch.tensor([0, 1, 2, 3])))


class Sure(Classifier):
    """Takes an image's brightness for its class, by given log-odds."""

    def __init__(self, odds):
        super().__init__("plain", 1, ("a", "b", "c"))
        self.odds = torch.nn.Parameter(torch.tensor(odds))

    def forward(self, images):
        seen = (images[:, 0, 0, 0] * 255).round().long()
        return torch.nn.functional.one_hot(seen, 3).float() * self.odds


def test_accuracy_and_log_probability_have_known_answers(network):
    """600 images, more than are classified at a time: two in three are what they are called."""
    labels = torch.arange(600) % 3
    seen = torch.where(labels == 2, 0, labels)
    images = seen.byte()[:, None, None, None].expand(-1, 1, 8, 8)
    judge = Judge(network, None, Sure(2.0))
    columns = judge.columns(images, labels)
    assert columns["accuracy"].tolist() == [1.0, 1.0, 0.0] * 200
    right, wrong = 2 - math.log(math.e**2 + 2), -math.log(math.e**2 + 2)
    assert columns["log_probability"].tolist() == pytest.approx([right, right, wrong] * 200)
    found = judge.figures(images, labels)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["log_probability"] == pytest.approx((2 * right + wrong) / 3)
    halves = [judge.columns(images[rows], labels[rows]) for rows in (slice(0, 250), slice(250, 600))]
    together = {name: torch.cat([half[name] for half in halves]) for name in halves[0]}
    assert judge.figures_of(together) == pytest.approx(found, rel=1e-5)


def test_drawn_images_do_not_depend_on_the_batch_size():
    pipeline = tiny_pipeline(Chain(guidance=1.5, diffusion_steps=8, clip=True))
    images, labels = draw_bytes(pipeline, 7, 3, seed=2)
    again, _ = draw_bytes(pipeline, 7, 3, seed=2, batch_size=2)
    assert torch.equal(images, again)
    assert labels.tolist() == [0, 1, 0, 1, 0, 1, 0]


def test_flops_of_a_one_token_chain_count_every_call():
    teacher, student = tiny_pipeline(Chain(guidance=1.0, diffusion_steps=8)), tiny_pipeline(OneStep())
    guided = tiny_pipeline(Chain(guidance=2.0, guidance_schedule="constant", diffusion_steps=8))
    once, chain, doubled = (flops_per_image(pipeline, 4) for pipeline in (student, teacher, guided))
    assert once < chain < doubled < 2.01 * chain


def test_results_resume_and_refuse_other_weights(network, tmp_path):
    judge = Judge(network, Statistics.of([torch.randn(50, 1280, generator=generator("real"))]), None)
    folder, out = tmp_path / "model", tmp_path / "figures.json"
    pipeline = tiny_pipeline(OneStep())
    pipeline.save(folder)
    said: list[str] = []
    run = {"iterations": (2, 3, 2), "samples": 6, "out": out, "report": said.append}
    rows = evaluate([(folder, pipeline)], judge, **run)
    assert [row["iterations"] for row in rows] == [2, 3]
    assert [line.split()[0] for line in said] == ["warning:", "tiny", "tiny"]  # 6 images are fewer than 1280 features
    assert all(row["fd_bias"] > 0 for row in rows)
    evaluate([(folder, pipeline)], judge, **run)
    assert len(said) == 3  # nothing is drawn again
    time_models([(folder, pipeline)], iterations=(2, 3), batches=(1, 2), repeats=1, out=out, report=said.append)
    results = json.loads(out.read_text())
    assert len(results["quality"]["rows"]) == 2
    assert len(results["timing"]["rows"]) == 4
    assert {"command", "commit", "seed", "torch"} <= set(results["quality"])
    before = [row for row in results["timing"]["rows"] if row["iterations"] == 3]
    time_models([(folder, pipeline)], iterations=(2,), batches=(1, 2), repeats=1, out=out, report=said.append)
    after = json.loads(out.read_text())["timing"]["rows"]
    assert len(after) == 4
    assert [row for row in after if row["iterations"] == 3] == before  # only what was timed again is replaced
    with pytest.raises(ValueError, match="expected 1 to 16 for tiny"):
        evaluate([(folder, pipeline)], judge, **run | {"iterations": (4, 17)})
    with pytest.raises(ValueError, match="--samples 1: expected at least 2"):
        evaluate([(folder, pipeline)], judge, **run | {"samples": 1})
    assert len(json.loads(out.read_text())["quality"]["rows"]) == 2
    tiny_pipeline(OneStep(), seed=1).save(folder)
    with pytest.raises(ValueError, match="other weights named tiny"):
        evaluate([(folder, pipeline)], judge, **run)
    with pytest.raises(ValueError, match="other weights named tiny"):
        time_models([(folder, pipeline)], iterations=(2,), batches=(1,), repeats=1, out=out)
    out.write_text("[]")
    with pytest.raises(ValueError, match="not a results file"):
        evaluate([(folder, pipeline)], judge, **run)


def test_a_batch_is_timed_whole_and_each_setting_once(tmp_path, monkeypatch):
    drawn, pipeline = [], tiny_pipeline(OneStep())
    pipeline.save(tmp_path / "model")

    def sample(self, labels, *, iterations, batch_size):
        drawn.append((len(labels), batch_size))

    monkeypatch.setattr(Pipeline, "sample", sample)
    monkeypatch.setattr("marval.evaluate.timing.SHORTEST", 0.0)
    rows = time_models(
        [(tmp_path / "model", pipeline)], iterations=(2, 2), batches=(256, 1, 1), repeats=1, out=tmp_path / "t.json"
    )
    assert [(row["iterations"], row["batch"]) for row in rows] == [(2, 256), (2, 1)]
    assert drawn == [(256, 256)] * 2 + [(1, 1)] * 2


def test_rows_without_what_is_asked_for_are_measured_again(network, tmp_path):
    real = Statistics.of([torch.randn(50, 1280, generator=generator("real"))])
    pipeline = tiny_pipeline(OneStep())
    pipeline.save(tmp_path / "model")
    run = {"iterations": (2,), "samples": 6, "out": tmp_path / "figures.json", "report": lambda line: None}
    (row,) = evaluate([(tmp_path / "model", pipeline)], Judge(network, real, None), **run)
    assert "accuracy" not in row
    (row,) = evaluate([(tmp_path / "model", pipeline)], Judge(network, real, Classifier("plain", 1, ("a", "b"))), **run)
    assert "accuracy" in row


def test_missing_real_images_are_missed_before_anything_is_drawn(network, tmp_path, monkeypatch):
    def missing():
        raise ValueError("no such images")

    def draws(*_, **__):
        raise AssertionError("drew first")

    judge = Judge(network, Statistics.of([torch.randn(50, 1280, generator=generator("real"))]), None, missing)
    monkeypatch.setattr("marval.evaluate.evaluate.draw_shards", draws)
    pipeline = tiny_pipeline(OneStep())
    pipeline.save(tmp_path / "model")
    with pytest.raises(ValueError, match="no such images"):
        evaluate([(tmp_path / "model", pipeline)], judge, iterations=(2,), samples=6, out=tmp_path / "figures.json")


def test_a_classifier_comes_back_from_disk_and_rewards_the_class_in_the_prompt(tmp_path):
    for architecture in ("plain", "residual"):
        classifier = Classifier(architecture, 1, ("shirt", "t-shirt", "bag")).eval()
        save_classifier(tmp_path / "c.safetensors", classifier, {})
        again = load_classifier(tmp_path / "c.safetensors")
        images = torch.rand(3, 1, 28, 28, generator=generator("images"))
        assert torch.equal(classifier(images), again(images))
    reward = ClassifierReward(again)
    images.requires_grad_(True)
    values = reward(images, prompts_of("a picture of {}", again.class_names, [1, 0, 2]))
    expected = again(images).log_softmax(dim=1)[[0, 1, 2], [1, 0, 2]]
    assert torch.equal(values, expected)
    values.sum().backward()
    assert (images.grad != 0).any(dim=(1, 2, 3)).all()


def test_a_chain_setting_for_a_student_is_refused():
    with pytest.raises(ValueError, match="baked in"):
        tiny_pipeline(OneStep()).with_chain(guidance=2.0)
    changed = tiny_pipeline(Chain(diffusion_steps=8)).with_chain(diffusion_steps=4, guidance=None)
    assert changed.config.draw == dataclasses.replace(Chain(diffusion_steps=8), steps=4)
