"""`marval bench`: its rows add up, and its savings are real."""

import dataclasses
import json
import statistics

import pytest
import torch

from marval.config import Chain, MARConfig, OneStep
from marval.evaluate.bench import DrawNothing, bench, peak_flops, savings
from marval.evaluate.results import read_results
from marval.evaluate.timing import in_turns
from marval.pipeline import Pipeline
from tiny import tiny_config, tiny_model


def tiny_pair():
    model, config = tiny_model(), tiny_config()
    teacher = dataclasses.replace(config, draw=Chain(guidance=2.0, diffusion_steps=50), name="teacher")
    return [Pipeline(model, c) for c in (teacher, dataclasses.replace(config, draw=OneStep(), name="student"))]


def test_rows_add_up(tmp_path):
    out, said = tmp_path / "bench.json", []
    rows = bench(tiny_pair(), iterations=(4, 8), batches=(1, 2), repeats=2, out=out, report=said.append)
    assert [(r["model"], r["iterations"], r["batch"]) for r in rows] == [
        (model, k, batch) for batch in (1, 2) for k in (4, 8) for model in ("teacher", "student")
    ]
    for row in rows:
        assert row["fastest"] <= row["seconds_per_image"] <= row["slowest"]
        assert row["context_seconds"] > 0
        assert row["gflops_per_second"] == pytest.approx(row["gflops_per_image"] / row["seconds_per_image"])
        assert 0 < row["fraction_of_peak"] < 1
        if row["model"] == "student":
            assert row["speed_up"] > 1
            assert row["speed_up_by_flops"] > 1
    assert len(json.loads(out.read_text())["bench"]["rows"]) == len(rows)
    assert any("last block" in line for line in said)


class Clock:
    """Stands still, but for the jobs, which take their time and leave their name."""

    def __init__(self, monkeypatch, drift=0.0):
        self.now, self.said, self.drift = 0.0, [], drift
        monkeypatch.setattr("marval.evaluate.timing.time.perf_counter", lambda: self.now)

    def job(self, name, seconds):
        def run():
            self.said.append(name)
            self.now += seconds * (1 + self.drift * len(self.said))

        return run


def test_jobs_take_turns_after_a_warm_up_and_short_ones_are_repeated(monkeypatch):
    clock = Clock(monkeypatch)
    times = in_turns([clock.job("long", 2.0), clock.job("short", 0.125)], 2, torch.device("cpu"))
    assert clock.said == ["long", "short", "short", "short"] * 3  # 0.3 s at least; one round warms up
    assert times == [[2.0, 2.0], [0.125, 0.125]]
    once = Clock(monkeypatch)
    assert in_turns([once.job("minutes", 100.0)], 0, torch.device("cpu")) == [[100.0]]
    assert once.said == ["minutes"]


def test_a_drifting_machine_hits_all_alike(monkeypatch):
    """A machine that gets slower and slower: medians of jobs in turns keep their ratio, one after the other not."""
    clock = Clock(monkeypatch, drift=0.01)
    slow, fast = in_turns([clock.job("slow", 2.0), clock.job("fast", 1.0)], 9, torch.device("cpu"))
    assert statistics.median(slow) / statistics.median(fast) == pytest.approx(2.0, rel=0.02)
    apart = Clock(monkeypatch, drift=0.01)
    (fast,), (slow,) = (in_turns([apart.job(n, s)], 9, torch.device("cpu")) for n, s in (("fast", 1.0), ("slow", 2.0)))
    assert statistics.median(slow) / statistics.median(fast) > 2.1


def test_bench_times_the_drawing_that_it_names(monkeypatch, tmp_path):
    """Every row's seconds are those of its own model, K and batch, per image, and the first round is left out."""
    clock, rounds = Clock(monkeypatch), []

    def drawing(pipeline, iterations, batch, *, autocast, draw):
        seconds = {"teacher": 10.0, "student": 1.0}[pipeline.config.name] * iterations * batch
        context = isinstance(draw, DrawNothing)

        def run():
            first = (id(run), batch) not in rounds
            rounds.append((id(run), batch))
            clock.now += (seconds / 4 if context else seconds) * (7 if first else 1)

        return run

    monkeypatch.setattr("marval.evaluate.bench.drawing", drawing)
    monkeypatch.setattr("marval.evaluate.bench.peak_flops", lambda *_: 1e15)
    rows = bench(tiny_pair(), iterations=(2, 4, 4), batches=(1, 8), repeats=3, out=tmp_path / "b.json", report=str)
    assert len(rows) == 8
    for row in rows:
        expected = {"teacher": 10.0, "student": 1.0}[row["model"]] * row["iterations"]
        assert row["seconds_per_image"] == row["fastest"] == row["slowest"] == pytest.approx(expected)
        assert row["context_seconds"] == pytest.approx(expected / 4)
        assert row["repeats"] == 3
        assert row["model"] == "teacher" or row["speed_up"] == pytest.approx(10.0)


def test_rows_replace_those_at_the_same_setting_only(tmp_path):
    out = tmp_path / "bench.json"
    pair = tiny_pair()
    said = {"out": out, "repeats": 0, "batches": (1,), "report": lambda line: None}
    bench(pair, iterations=(2, 4), **said)
    before = {(r["model"], r["iterations"]): r["seconds_per_image"] for r in read_results(out)["bench"]["rows"]}
    bench(pair[:1], iterations=(2,), **said)
    bench(pair[:1], iterations=(2,), autocast=True, **said)
    rows = read_results(out)["bench"]["rows"]
    after = {(r["model"], r["iterations"], r["autocast"]): r["seconds_per_image"] for r in rows}
    assert len(rows) == len(after) == 5
    assert all(after[key[0], key[1], False] == seconds for key, seconds in before.items() if key != ("teacher", 2))
    assert after["teacher", 2, False] != before["teacher", 2]


def test_the_peak_is_no_less_than_a_product_reaches():
    assert peak_flops(torch.device("cpu"), autocast=False, repeats=1) > 1e9


def test_savings_are_shares_and_vanish_where_all_tokens_are_drawn_at_once():
    config = MARConfig.imagenet256("base")
    for k in (16, 64, 256):
        assert all(0 < share < 1 for share in savings(config, k).values())
    assert savings(config, 1)["last block computes drawn tokens only"] == 0
    assert savings(config, 1)["head computes drawn tokens only"] == 0
