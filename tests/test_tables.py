"""tools/tables.py: tables of results files, and the documents whose tables they are."""

import json
from pathlib import Path

import pytest
import scipy.stats
import torch

from marval.evaluate.compare import compare
from marval.evaluate.metrics import METRICS
from marval.evaluate.results import standard_error, write_results
from marval.evaluate.rewards import mean_and_error
from result_rows import quality, teacher, timed, write, write_curve
from tables import bench, fill, made_by, speed
from tables import quality as quality_table
from tables import rewards as rewards_table

ROOT = Path(__file__).parents[1]


def test_a_document_is_filled_and_says_which_commands_made_its_tables(tmp_path):
    made = {"command": "marval evaluate s", "commit": "c" * 40}
    write(tmp_path / "r.json", [quality(), quality(seed=1) | {"made": {**made, "command": "marval evaluate t"}}])
    text = fill("a\n<!-- table: quality r.json -->\nold\n<!-- end -->\nb", tmp_path)
    assert "old" not in text
    assert "| s | 8 | 100 | 10.00 ± 0.00 |" in text
    assert text.startswith("a\n<!-- table: quality r.json -->\n")
    assert text.endswith("<!-- end -->\nb")
    assert "- quality: `marval evaluate s` at commit ccccccc\n- quality: `marval evaluate t` at" in text
    assert fill(text, tmp_path) == text
    assert made_by(tmp_path / "r.json", ("timing",)) == "Made by\n"
    with pytest.raises(ValueError, match="unknown table nonsense"):
        fill("<!-- table: nonsense r.json --><!-- end -->", tmp_path)
    with pytest.raises(ValueError, match=r"none\.json is not there"):
        fill("<!-- table: quality none.json --><!-- end -->", tmp_path)


def test_rewards_of_several_seeds_are_one_row(tmp_path):
    rows = []
    for seed, (mean, error) in enumerate(((0.5, 0.03), (0.7, 0.04))):
        row = quality(seed=seed, samples=7, prompts=2, seeds=7, prompt="one {}")
        rows.append(row | {"rewards": {"bright": {"mean": mean, "standard_error": error}}})
    write_results(tmp_path / "r.json", "rewards", rows, 0)
    assert "| s | 8 | 14 | 2 | 14 | 0.6000 ± 0.0250 |" in rewards_table(tmp_path / "r.json")


def test_ratios_are_of_equal_counts_precision_and_machine(tmp_path):
    """The teacher's 10,000 images never meet the student's 100, nor its bf16 float32, nor its GPU a CPU."""
    rows = [
        teacher(8, 100, 20.0), teacher(8, 100, 5.0, samples=10_000), teacher(8, 100, 40.0, autocast=True),
        quality(fd=10.0), quality("u", fd=2.5, samples=10_000), quality("v", fd=8.0, samples=500),
    ]  # fmt: skip
    machine = {"made": {"device": "cpu", "threads": 2}}
    times = [timed(rows[0], 1.0) | {"made": {"device": "cuda"}}, timed(rows[3], 0.1) | machine]
    file = write(tmp_path / "r.json", rows, times)
    table = speed(file)
    assert "| s | 8 | 100 | 0.500 |  |" in table  # the teacher's time is of another machine: no speed-up
    assert "| u | 8 | 10000 | 0.500 |  |" in table
    assert "| v |" not in table
    assert "1 of 2 times are left out: they are of another machine" in table
    write_results(file, "timing", [timed(rows[0], 1.0) | machine, times[1]], 0)
    assert "| s | 8 | 100 | 0.500 | 10x |" in speed(file)
    slow = timed(rows[2], 0.5) | machine  # bf16, as most are not
    write_results(file, "timing", [slow, timed(rows[0], 1.0) | machine, times[1]], 0)
    assert "| s | 8 | 100 | 0.500 | 10x |" in speed(file)


def test_tables_show_means_over_seeds_and_the_chains_that_vary(tmp_path):
    curve = write_curve(tmp_path)
    table = quality_table(curve)
    assert table.splitlines()[0].startswith("| model | K | T | w | samples | FD on E |")
    assert "| t | 16 | 10 | 3 | 100 | 25.00 |" in table
    assert "| s | 8 |  |  | 100 | 9.25 ± 0.25 | 0.9000 ± 0.0000 |" in table  # sqrt(0.125) / sqrt(2)
    assert "± is one standard error of the mean, over 2 seeds of the images" in table
    assert "not the published figures of these names" in table


def test_the_one_meaning_of_plus_minus_is_the_standard_error_of_the_mean(tmp_path):
    values = [3.0, 4.0, 8.0]
    assert standard_error(values) == (5.0, pytest.approx(scipy.stats.sem(values)))
    assert mean_and_error(torch.tensor(values)) == {"mean": 5.0, "standard_error": pytest.approx(1.53, abs=0.005)}
    file = write(tmp_path / "r.json", [quality(seed=seed, fd=fd) for seed, fd in enumerate(values)])
    assert "| 5.00 ± 1.53 |" in quality_table(file)


def test_a_time_of_another_precision_than_the_images_says_so(tmp_path):
    row = quality(autocast=True)
    file = write(tmp_path / "r.json", [row], [timed(row, 0.2) | {"autocast": False}])
    assert "| 200.00 (float32) |" in quality_table(file)
    write_results(file, "timing", [timed(row, 0.2) | {"autocast": False}, timed(row, 0.1)], 0)
    assert "| 100.00 |" in quality_table(file)


def test_figures_of_older_metrics_have_todays_names_and_say_what_they_are(tmp_path):
    """Rows without a version: KID is on EfficientNet's features, diversity on the first 200 images of a class."""
    old = quality(kid=0.5, precision=0.7, diversity=40.0, features="EfficientNet-Lite0, pooled, 64x64 bilinear")
    file = write(tmp_path / "old.json", [old, old | {"seed": 1}])
    table = quality_table(file)
    assert "| KID-EfficientNet | precision-EfficientNet |" in table
    assert "| KID |" not in table
    assert "diversity by metrics 1 is of the first 200 images of a class" in table
    own = write(tmp_path / "own.json", [quality(kid=0.5, features="my:net")])
    assert "| KID on own features |" in quality_table(own)
    new = write(tmp_path / "new.json", [old | {"seed": seed, "metrics": METRICS, "diversity": 30.0} for seed in (0, 1)])
    said, found = compare(file, new)
    assert "diversity" not in {difference.figure for difference in found}
    assert any("diversity is not compared: by metrics 1 it is of the first 200" in line for line in said)
    mixed = write(tmp_path / "mixed.json", [old, old | {"seed": 1, "metrics": METRICS, "fd": 90.0}])
    assert "| 10.00 |" in quality_table(mixed)  # no mean over two definitions


def test_tables_compare_models_with_the_first_at_the_same_k(tmp_path):
    def quality(model, k, fd):
        return {"model": model, "teacher": model == "t", "draw": {}, "iterations": k, "samples": 10, "fd": fd}

    def timing(model, k, seconds):
        return {"model": model, "draw": {}, "iterations": k, "batch": 1, "seconds_per_image": seconds}

    results = {
        "quality": {
            "rows": [quality("s", 8, 10.0), quality("s", 16, 9.0), quality("t", 8, 12.0), quality("t", 16, 10.0)]
        },
        "timing": {"rows": [timing("t", 8, 5.0), timing("t", 16, 8.0), timing("s", 8, 0.1), timing("s", 16, 0.2)]},
    }
    (tmp_path / "r.json").write_text(json.dumps(results))
    table = speed(tmp_path / "r.json")
    assert "| s | 16 | 10 | 0.900 | 40x |" in table
    assert "| s | 8 | 10 | 0.833 | 50x |" in table


def test_a_bench_becomes_a_table(tmp_path):
    row = {"model": "t", "draw": {}, "iterations": 4, "batch": 2, "seconds_per_image": 2.0, "context_seconds": 0.5}
    row |= {"gflops_per_image": 6033.6, "fraction_of_peak": 0.586}
    faster = {**row, "model": "s", "seconds_per_image": 0.5, "speed_up": 4.0, "speed_up_by_flops": 2.04}
    (tmp_path / "b.json").write_text(json.dumps({"bench": {"rows": [row, faster]}}))
    table = bench(tmp_path / "b.json")
    assert "| t | 4 | 2 | 2.0 | 25% | 6,034 | 59% |  |  |" in table
    assert "| s | 4 | 2 | 0.5 | 100% | 6,034 | 59% | 4.0x | 2.0x |" in table
