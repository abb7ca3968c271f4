"""Results files: what is read, merged and refused; and two of them compared."""

import json
import re
import sys

import pytest
import scipy.stats

from marval.cli import main
from marval.evaluate.compare import compare
from marval.evaluate.features import METRICS
from marval.evaluate.results import merge_results, read_results, standard_error, write_results
from result_rows import quality, teacher, timed, write


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "null", "{", '{"quality": 1}', '{"quality": []}', '{"quality": {}}',
        '{"quality": {"rows": [1]}}', '{"quality": {"rows": [{}]}}', '{"quality": {"quality": {"rows": []}}}',
        '{"timing": {"rows": [{"model": "s", "draw": {}, "iterations": 4, "batch": 1}]}}', '{"name": "marval"}',
        '{"quality": {"rows": [{"model": "s", "draw": 3, "iterations": 4, "samples": 2}]}}', "[" * 100_000,
        "\x00\xff",
    ],
)  # fmt: skip
def test_what_is_no_results_file_is_refused_in_one_line(tmp_path, text):
    file = tmp_path / "r.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"r\.json is not a results file \([^\n]*\): choose another --out$"):
        read_results(file)


def test_files_of_older_versions_are_read_under_todays_names(tmp_path):
    """They wrote what made a part once, and not under its rows."""
    old = quality(draw={"kind": "chain", "steps": 50, "guidance": 3.0}, kid=0.5)
    (tmp_path / "r.json").write_text(json.dumps({"quality": {"command": "c", "machine": "m", "rows": [old]}}))
    (row,) = read_results(tmp_path / "r.json")["quality"]
    assert row["draw"]["diffusion_steps"] == 50
    assert row["efficientnet_kid"] == 0.5
    assert "kid" not in row
    assert row["made"] == {"command": "marval evaluate s", "commit": "c" * 40, "machine": "m"}


def row(k, **changes):
    return {**quality(k=k, samples=8, metrics=METRICS), **changes}


def write_ten(out, first):
    for k in range(10):
        merge_results(out, "quality", [row(10 * first + k)])


def test_two_commands_on_one_file_lose_no_row(tmp_path):
    """Four processes write ten rows each, one at a time, into one file."""
    import multiprocessing

    out = tmp_path / "r.json"
    work = [multiprocessing.get_context("fork").Process(target=write_ten, args=(out, first)) for first in range(4)]
    for process in work:
        process.start()
    for process in work:
        process.join()
    assert sorted(r["iterations"] for r in read_results(out)["quality"]) == list(range(40))
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_rows_replace_their_own_kind_and_refuse_other_weights(tmp_path):
    out = tmp_path / "r.json"
    merge_results(out, "quality", [row(2, fd=1.0), row(3, fd=2.0), row(2, seed=1, fd=3.0)])
    merge_results(out, "quality", [row(2, fd=5.0)])
    assert sorted(r["fd"] for r in read_results(out)["quality"]) == [2.0, 3.0, 5.0]
    with pytest.raises(ValueError, match="other weights named s"):
        merge_results(out, "quality", [row(4, sha256="b")])
    with pytest.raises(ValueError, match="expected 'other'"):
        merge_results(out, "quality", [row(4, features="other")])
    for name in ("clip", "other"):  # two commands that score the same images by different rewards
        merge_results(out, "rewards", [row(2, prompt="{}", rewards={name: {"mean": 1.0, "standard_error": 0.1}})])
    (scored,) = read_results(out)["rewards"]
    assert set(scored["rewards"]) == {"clip", "other"}


# Two files compared


def test_differences_come_first_and_the_rest_is_counted(tmp_path, monkeypatch, capsys):
    first = write(tmp_path / "a.json", [quality(seed=s, fd=f) for s, f in ((0, 10.0), (1, 11.0), (2, 12.0))])
    rows = [quality(seed=s, fd=f, sha256="b" * 64) for s, f in ((0, 12.0), (1, 12.5), (2, 13.0))]
    second = write(tmp_path / "b.json", [*rows, quality(k=16), quality(k=32)])
    monkeypatch.setattr(sys, "argv", ["marval", "compare", str(first), str(second)])
    main()
    table, lines = (part.split("\n") for part in capsys.readouterr().out.split("1 of 2 figures differ"))
    cells = next(re.split(" {2,}", line.strip()) for line in table if line.lstrip().startswith("s K=8"))
    assert cells == ["s K=8, 100 samples", "fd", "11", "12.5", "+1.5", "± 1.2", "3 seeds"]
    assert lines[1] == "1 of 2 figures: the same"
    assert any("sha256" in line and "a" * 64 in line and "b" * 64 in line for line in lines)
    assert f"only in {second}: s K=16, 100 samples and 1 more" in lines
    assert {difference.verdict for difference in compare(first, first)[1]} == {"the same"}
    one = write(tmp_path / "one.json", [quality("tuned", fd=9.0)])  # one model each: compared under different names
    _, alone = compare(write(tmp_path / "other.json", [quality()]), one)
    assert alone[0].verdict.startswith("too few to tell")


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ([10.0, 12.0, 14.0], [10.5, 12.6, 14.5], "a difference"),  # by pairs only: the seeds differ by more
        ([10.0, 10.2, 9.9], [10.1, 10.0, 10.3], "no more than chance"),
        ([10.0, 10.4, 9.7, 10.1, 10.3, 9.8], [10.6, 10.7, 10.9, 10.7, 10.3, 10.5], "a difference"),
    ],
)
def test_chance_is_the_interval_of_the_mean_difference_of_pairs(first, second, verdict, tmp_path):
    files = [
        write(tmp_path / f"{name}.json", [quality(seed=seed, fd=fd) for seed, fd in enumerate(values)])
        for name, values in (("a", first), ("b", [*second, 99.0]))  # a seed that only one side has does not count
    ]
    _, (difference, _) = compare(*files)
    result = scipy.stats.ttest_rel(first, second)
    assert (difference.figure, difference.verdict) == ("fd", verdict)
    assert (result.pvalue < 0.05) == (verdict == "a difference")
    assert difference.counts == f"{len(first)} seeds"
    low, high = result.confidence_interval()
    assert difference.chance == pytest.approx((high - low) / 2, rel=0.031)


def test_times_differ_where_their_rounds_do_not_overlap(tmp_path):
    def file(name, **changes):
        row = timed(quality(), 1.0) | {"fastest": 0.9, "slowest": 1.2, "repeats": 3} | changes
        return write(tmp_path / name, [], [row])

    base = file("base.json")
    for name, verdict, changes in (
        ("apart", "a difference", {"seconds_per_image": 1.4, "fastest": 1.21, "slowest": 1.5}),
        ("over", "no more than chance", {"seconds_per_image": 1.4, "fastest": 1.19, "slowest": 1.5}),
        ("faster", "a difference", {"seconds_per_image": 0.8, "fastest": 0.7, "slowest": 0.89}),
        ("once", "too few to tell", {"seconds_per_image": 9.0, "repeats": 1}),
    ):
        (difference,) = compare(base, file(f"{name}.json", **changes))[1]
        assert difference.verdict.startswith(verdict)
    with pytest.raises(ValueError, match="share no setting"):
        compare(base, file("bf16.json", dtype="bfloat16"))


def test_a_teacher_and_a_student_compare_where_each_file_holds_one(tmp_path):
    a = write(tmp_path / "t.json", [teacher(8, 100, fd, seed=s) for s, fd in ((0, 12.0), (1, 12.1), (2, 11.9))])
    b = write(tmp_path / "s.json", [quality(seed=s, fd=fd) for s, fd in ((0, 9.0), (1, 9.1), (2, 9.2))])
    lines, differences = compare(a, b)
    assert differences[0].setting == "t K=8, T=100, w=3, 100 samples, against s"
    assert (differences[0].verdict, differences[0].counts) == ("a difference", "3 seeds")
    assert any("draw" in line for line in lines)
    several = write(tmp_path / "two.json", [teacher(8, 100, 12.0), teacher(8, 10, 30.0)])
    with pytest.raises(ValueError, match="share no setting"):  # which of the two chains?
        compare(several, b)


def test_rewards_compare_by_seeds_and_of_one_weight(tmp_path):
    def scored(name, means, digest="1"):
        rows = [
            quality(seed=s, rewards={"clip": {"mean": mean, "standard_error": 0.1, "sha256": digest}})
            for s, mean in enumerate(means)
        ]
        write_results(tmp_path / name, "rewards", rows)
        return tmp_path / name

    first = scored("a.json", [20.0, 20.4, 20.2])
    (one,) = compare(first, scored("b.json", [21.0, 21.4, 21.1]))[1]
    assert (one.figure, one.first, one.counts) == ("clip", pytest.approx(20.2), "3 seeds")
    assert one.verdict == "a difference"
    with pytest.raises(ValueError, match="rewards of other weights: these do not compare"):
        compare(first, scored("c.json", [21.0], digest="2"))


def test_compare_refuses_what_does_not_compare(tmp_path):
    first = write(tmp_path / "a.json", [quality()])
    with pytest.raises(ValueError, match="features 'E' and 'my:net'"):
        compare(first, write(tmp_path / "features.json", [quality(features="my:net")]))
    with pytest.raises(ValueError, match=r"data_sha256 'd+' and 'e+'"):
        compare(first, write(tmp_path / "data.json", [quality(data_sha256="e" * 64)]))
    with pytest.raises(ValueError, match="share no setting"):
        compare(first, write(tmp_path / "k.json", [quality(k=3)]))
    with pytest.raises(ValueError, match=r"nowhere\.json is not there"):
        compare(first, tmp_path / "nowhere.json")


def test_the_one_meaning_of_plus_minus_is_the_standard_error_of_the_mean():
    values = [3.0, 4.0, 8.0]
    assert standard_error(values) == (5.0, pytest.approx(scipy.stats.sem(values)))
