"""`marval bench`: its rows add up, and its savings are real."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from marval.bench import bench, peak_flops, savings
from marval.config import Chain, MARConfig, OneStep
from marval.pipeline import Pipeline
from tiny import tiny_config, tiny_model


def tiny_pair():
    model, config = tiny_model(), tiny_config()
    teacher = dataclasses.replace(config, draw=Chain(guidance=2.0, steps=50), name="teacher")
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


def test_the_peak_is_no_less_than_a_product_reaches():
    assert peak_flops(torch.device("cpu"), autocast=False, repeats=1) > 1e9


def test_savings_are_shares_and_vanish_where_all_tokens_are_drawn_at_once():
    config = MARConfig.imagenet256("base")
    for k in (16, 64, 256):
        assert all(0 < share < 1 for share in savings(config, k).values())
    assert savings(config, 1)["last block computes drawn tokens only"] == 0
    assert savings(config, 1)["head computes drawn tokens only"] == 0


def test_the_command_writes_rows_and_refuses_nonsense(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "marval", "bench", *arguments, "--out", str(tmp_path / "bench.json")]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    done = run("fashion-student", "--iterations", "2", "--batches", "1", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    assert "% of the peak" in done.stdout
    for arguments in [("imagenet256-tiny",), ("fashion-student", "--batches", "0"), ()]:
        refused = run(*arguments)
        assert refused.returncode == 2
        assert refused.stderr.count("\n") <= 1 or not arguments


@pytest.mark.slow
def test_compiled_models_run(tmp_path):
    """In a process of its own: the tests' shape checks cannot be compiled."""
    command = [sys.executable, "-m", "marval", "bench", "fashion-student", "--compiled", "--iterations", "2"]
    command += ["--batches", "1", "--repeats", "1", "--out", str(tmp_path / "bench.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "bench.json").read_text())["bench"]["rows"][0]["compiled"]
