"""tools/tables.py: tables of results files, and the documents whose tables they are."""

import json

import pytest
import scipy.stats

from marval.evaluate.results import standard_error, write_results
from result_rows import quality, teacher, timed, write, write_curve
from tables import TABLES, fill, recorded


def table(kind, file):
    return TABLES[kind][0](recorded(file))


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
    with pytest.raises(ValueError, match="unknown table nonsense"):
        fill("<!-- table: nonsense r.json --><!-- end -->", tmp_path)
    with pytest.raises(ValueError, match=r"none\.json is not there"):
        fill("<!-- table: quality none.json --><!-- end -->", tmp_path)


def test_rewards_of_several_seeds_are_one_row(tmp_path):
    rows = []
    for seed, (mean, error) in enumerate(((0.5, 0.03), (0.7, 0.04))):
        row = quality(seed=seed, samples=7, prompts=2, seeds=7, prompt="one {}")
        rows.append(row | {"rewards": {"bright": {"mean": mean, "standard_error": error}}})
    write_results(tmp_path / "r.json", "rewards", rows)
    assert "| s | 8 | 14 | 2 | 14 | 0.6000 ± 0.0250 |" in table("rewards", tmp_path / "r.json")


def test_ratios_are_of_equal_counts_precision_and_machine(tmp_path):
    """The teacher's 10,000 images never meet the student's 100, nor its bf16 float32, nor its GPU a CPU."""
    rows = [
        teacher(8, 100, 20.0), teacher(8, 100, 5.0, samples=10_000), teacher(8, 100, 40.0, dtype="bfloat16"),
        quality(fd=10.0), quality("u", fd=2.5, samples=10_000), quality("v", fd=8.0, samples=500),
    ]  # fmt: skip
    machine = {"made": {"device": "cpu", "threads": 2}}
    times = [timed(rows[0], 1.0) | {"made": {"device": "cuda"}}, timed(rows[3], 0.1) | machine]
    file = write(tmp_path / "r.json", rows, times)
    text = table("speed", file)
    assert "| s | 8 | 100 | 0.500 |  |" in text  # the teacher's time is of another machine: no speed-up
    assert "| u | 8 | 10000 | 0.500 |  |" in text
    assert "| v |" not in text
    write_results(file, "timing", [timed(rows[0], 1.0) | machine, times[1]])
    assert "| s | 8 | 100 | 0.500 | 10x |" in table("speed", file)
    slow = timed(rows[2], 0.5) | machine  # bf16, as most are not
    write_results(file, "timing", [slow, timed(rows[0], 1.0) | machine, times[1]])
    assert "| s | 8 | 100 | 0.500 | 10x |" in table("speed", file)


def test_tables_show_means_over_seeds_the_chains_that_vary_and_times(tmp_path):
    text = table("quality", write_curve(tmp_path))
    assert text.splitlines()[0].startswith("| model | K | T | w | samples | FD on E |")
    assert "| t | 16 | 10 | 3 | 100 | 25.00 |" in text
    assert "| s | 8 |  |  | 100 | 9.25 ± 0.25 | 0.9000 ± 0.0000 |" in text  # sqrt(0.125) / sqrt(2)
    assert "± is one standard error of the mean, over 2 seeds of the images" in text
    row = quality(dtype="bfloat16")
    file = write(tmp_path / "r.json", [row], [timed(row, 0.2) | {"dtype": "float32"}])
    assert "| 200.00 (float32) |" in table("quality", file)  # of another precision than the images
    write_results(file, "timing", [timed(row, 0.2) | {"dtype": "float32"}, timed(row, 0.1)])
    assert "| 100.00 |" in table("quality", file)


def test_the_one_meaning_of_plus_minus_is_the_standard_error_of_the_mean(tmp_path):
    values = [3.0, 4.0, 8.0]
    assert standard_error(values) == (5.0, pytest.approx(scipy.stats.sem(values)))
    file = write(tmp_path / "r.json", [quality(seed=seed, fd=fd) for seed, fd in enumerate(values)])
    assert "| 5.00 ± 1.53 |" in table("quality", file)


def test_figures_of_older_metrics_have_todays_names_and_say_what_they_are(tmp_path):
    """Rows without a version: KID is on EfficientNet's features, diversity on the first 200 images of a class."""
    old = quality(kid=0.5, precision=0.7, diversity=40.0, features="EfficientNet-Lite0, pooled, 64x64 bilinear")
    text = table("quality", write(tmp_path / "old.json", [old, old | {"seed": 1}]))
    assert "| KID-EfficientNet | precision-EfficientNet |" in text
    assert "diversity by metrics 1 is of the first 200 images of a class" in text


def test_times_with_operations_become_a_table(tmp_path):
    """Rows of today, and those of the former bench, which knew the context network's share."""
    row = timed(teacher(4, 100, 1.0), 2.0, batch=2) | {"gflops_per_image": 6033.6, "fraction_of_peak": 0.586}
    faster = timed(quality(k=4), 0.5, batch=2) | {"gflops_per_image": 2957.6, "fraction_of_peak": 0.586}
    write_results(tmp_path / "b.json", "timing", [row, faster])
    text = table("bench", tmp_path / "b.json")
    assert "| t | 4 | 2 | 2.0 | 6,034 | 59% |  |  |" in text
    assert "| s | 4 | 2 | 0.5 | 2,958 | 59% | 4.0x | 2.0x |" in text
    (tmp_path / "b.json").write_text(json.dumps({"bench": {"rows": [row | {"context_seconds": 0.5}]}}))
    assert "| t | 4 | 2 | 2.0 | 25% | 6,034 | 59% |  |  |" in table("bench", tmp_path / "b.json")
