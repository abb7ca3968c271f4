"""Speed: jobs take turns, rows say what was timed, and operations are those that torch counts."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from marval.config import Chain, MARConfig, ModelConfig, OneStep, PixelSpace
from marval.evaluate.results import read_results
from marval.evaluate.speed import flops_per_image, in_turns, measure_speed
from marval.pipeline import Pipeline
from marval.sampling import draw_function, sample
from tiny import tiny_config, tiny_model


def pipeline_of(draw, name="tiny"):
    return Pipeline(tiny_model(), dataclasses.replace(tiny_config(), draw=draw, name=name))


def tiny_pair():
    return [(None, pipeline_of(Chain(2.0, diffusion_steps=50), "teacher")), (None, pipeline_of(OneStep(), "student"))]


class Clock:
    """Stands still, but for the jobs, which take their time and leave their name."""

    def __init__(self, monkeypatch):
        self.now, self.said = 0.0, []
        monkeypatch.setattr("marval.evaluate.speed.time.perf_counter", lambda: self.now)
        monkeypatch.setattr("marval.evaluate.speed.synchronize", lambda device: self.said.append("wait"))

    def job(self, name, seconds):
        def run():
            self.said.append(name)
            self.now += seconds

        return run


def test_jobs_take_turns_after_a_warm_up_and_short_ones_are_repeated(monkeypatch):
    clock = Clock(monkeypatch)
    times = in_turns([clock.job("long", 2.0), clock.job("short", 0.125)], 2, torch.device("cpu"))
    names = ["long", "short", "short", "short"] * 3  # 0.3 s at least; one round warms up
    assert clock.said == [word for name in names for word in ("wait", name, "wait")]
    assert times == [[2.0, 2.0], [0.125, 0.125]]
    once = Clock(monkeypatch)
    assert in_turns([once.job("minutes", 100.0)], 0, torch.device("cpu")) == [[100.0]]


def test_rows_are_of_their_own_model_k_and_batch_and_replace_those_at_the_same_setting(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)

    def drawing(pipeline, iterations, batch):
        seconds = {"teacher": 10.0, "student": 1.0}[pipeline.config.name] * iterations * batch
        return clock.job("draw", seconds * (0.5 if pipeline.model.mask_token.dtype == torch.bfloat16 else 1))

    monkeypatch.setattr("marval.evaluate.speed.drawing", drawing)
    out, pair = tmp_path / "r.json", tiny_pair()
    rows = measure_speed(pair, out, iterations=(2, 4, 4), batches=(1, 8), repeats=3)
    assert [(row["model"], row["iterations"], row["batch"]) for row in rows] == [
        (model, k, batch) for batch in (1, 8) for model in ("teacher", "student") for k in (2, 4)
    ]
    for row in rows:
        expected = {"teacher": 10.0, "student": 1.0}[row["model"]] * row["iterations"]
        assert row["seconds_per_image"] == row["fastest"] == row["slowest"] == pytest.approx(expected)
        assert row["gflops_per_image"] > 0
        assert (row["repeats"], row["decoded"], row["made"]["processes"]) == (3, True, 1)
    monkeypatch.setattr(clock, "job", lambda name, seconds: lambda: setattr(clock, "now", clock.now + 2 * seconds))
    for dtype in (torch.float32, torch.bfloat16):
        pair[0][1].to(dtype=dtype)
        measure_speed(pair[:1], out, iterations=(2,), repeats=0)
    after = {(r["model"], r["iterations"], r["batch"], r["dtype"]): r for r in read_results(out)["timing"]}
    assert len(after) == len(rows) + 1
    assert after["teacher", 2, 1, "float32"]["seconds_per_image"] == 40.0
    assert after["teacher", 2, 1, "bfloat16"]["seconds_per_image"] == 20.0
    assert after["teacher", 4, 1, "float32"]["seconds_per_image"] == 40.0


@pytest.mark.parametrize("iterations", [1, 3, 16])
@pytest.mark.parametrize(
    ("draw", "cached"),
    [
        (OneStep(), False),
        (OneStep(), True),
        (Chain(guidance=1.0, diffusion_steps=5), False),
        (Chain(guidance=1.5, diffusion_steps=7), False),
    ],
)
def test_operations_are_those_of_a_whole_image(draw, cached, iterations):
    """The counter knows neither oneDNN's layers, which need inference mode, nor the CPU's flash attention."""
    pipeline = pipeline_of(draw)
    pipeline.model.config = dataclasses.replace(pipeline.model.config, cached=cached)
    pipeline.config = dataclasses.replace(pipeline.config, mar=pipeline.model.config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        condition = pipeline.model.embed(torch.tensor([0]))
        sample(pipeline.model, draw_function(pipeline.config), condition, iterations=iterations, seeds=[0])
    assert flops_per_image(pipeline.config, iterations) == counter.get_total_flops()


def test_an_image_of_a_cached_student_takes_as_many_operations_at_any_k():
    mar = MARConfig.fashion((7, 7), 16, 10)
    space, names = PixelSpace((28, 28), 1, 4, shift=0.5, scale=2.0), tuple("abcdefghij")
    config = ModelConfig(dataclasses.replace(mar, cached=True), space, OneStep(), names, 8)
    cached = [flops_per_image(config, iterations) for iterations in (4, 16, 49)]
    assert max(cached) < 1.2 * min(cached)
    plain = dataclasses.replace(config, mar=mar)
    assert flops_per_image(config, 1) == flops_per_image(plain, 1)
    assert flops_per_image(plain, 49) > 10 * cached[-1]
