"""Results as people read them: points of quality and time, the best within a budget, the curve, tables."""

import pytest
from PIL import Image

from marval.evaluate.report import best_within, plot_curve, points_of, print_results
from marval.evaluate.results import by_setting, read_results, write_results
from result_rows import quality, teacher, timed, write, write_curve


def points(file, batch=1, **options):
    return points_of(read_results(file), batch, **options)


def test_points_join_quality_and_time(tmp_path):
    curve = points(write_curve(tmp_path))
    assert [str(p.setting) for p in curve] == [
        "t K=8, T=10, w=3", "t K=16, T=10, w=3", "t K=8, T=100, w=3", "t K=16, T=100, w=3", "s K=4", "s K=8",
    ]  # fmt: skip
    assert curve[-1].distance == pytest.approx(9.25)  # the mean of two seeds
    assert best_within(curve, 0.03) == "best within 0.03 s an image: s K=4: FD on E 12.00 in 0.02 s"
    assert "t K=16, T=100" in best_within(curve, 5.0)
    assert best_within(curve, 0.001).startswith("none draws an image in 0.001 s: the fastest is s K=4")
    plot_curve(curve, tmp_path / "p.png", 1)
    with Image.open(tmp_path / "p.png") as picture:
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20)) > 20
    assert points(tmp_path / "curve.json", batch=64) == []
    for refused in (lambda: best_within([], 1.0), lambda: plot_curve([], tmp_path / "none.png", 1)):
        with pytest.raises(ValueError, match="no setting has both a distance and a time"):
            refused()


def test_points_take_times_of_the_same_weights_and_precision_and_fid_where_it_was_measured(tmp_path):
    """A point is a setting that somebody can run; what has no such time is left out, and said so."""
    row = quality(autocast=True) | {"fid": 2.5}
    row.pop("fd")
    weights = {"sha256": row["sha256"]}
    times = [
        timed(row, 0.1) | weights, timed(row, 0.2) | weights | {"autocast": False},
        timed(row, 0.3) | {"sha256": "b" * 64}, timed(row, 0.4) | weights | {"compiled": True},
        timed(row, 0.5) | weights | {"decoded": False},
    ]  # fmt: skip
    file, said = write(tmp_path / "r.json", [row]), []
    for order in (times, times[::-1]):
        write_results(file, "timing", order)
        (point,) = points(file, report=said.append)
        assert (point.seconds, point.distance, point.measure) == (0.1, 2.5, "FID")
    assert said == []
    for alone in (times[1:2], times[3:4], times[4:5]):
        write_results(file, "timing", alone)
        assert points(file, report=said.append) == []
        assert said.pop() == "left out, timed in another precision, compiled or without decoding: s K=8"
        assert len(points(file, mixed=True)) == 1  # older results have no others
    write_results(file, "timing", times[2:3])
    assert points(file) == []  # of other weights


def test_points_have_equal_numbers_of_samples_and_times_of_one_machine(tmp_path):
    """A Fréchet distance falls with the number of samples: the student's 10,000 are left out against the rest's 100."""
    rows = [teacher(8, 100, 10.0), teacher(16, 100, 8.0), quality(fd=9.0), quality(fd=5.0, samples=10_000)]
    times = [timed(row, 1.0) | {"made": {"device": "cpu", "threads": 2}} for row in rows[:3]]
    file, said = write(tmp_path / "r.json", rows, times), []
    assert {(str(p.setting), p.distance, p.setting.samples) for p in points(file, report=said.append)} == {
        ("t K=8, T=100, w=3", 10.0, 100), ("t K=16, T=100, w=3", 8.0, 100), ("s K=8", 9.0, 100),
    }  # fmt: skip
    assert said == ["left out, with other numbers of samples, precision or metrics than most: 1 settings"]
    assert [p.distance for p in points(file, samples=10_000)] == [5.0]
    assert {p.setting.model for p in points(file, models={"s"})} == {"s"}
    write_results(file, "timing", [*times[:2], times[2] | {"made": {"device": "cuda", "threads": 2}}])
    assert [str(p.setting) for p in points(file, report=said.append)] == ["s K=8"]
    assert said[1].startswith("2 of 3 times are left out: they are of another machine")


def test_the_console_shows_quality_and_speed_and_what_they_mean(tmp_path, capsys):
    rows = [teacher(8, 100, 10.0), quality(seed=0), quality(seed=1, fd=12.0)]
    speed = {"gflops_per_image": 3.0, "fraction_of_peak": 0.1, "memory_bytes": 2**21}
    times = [timed(rows[0], 2.0) | speed, timed(rows[0], 0.5, batch=64) | speed | {"fraction_of_peak": 0.4}]
    print_results(write(tmp_path / "r.json", rows, times))
    text = " ".join(capsys.readouterr().out.split())
    assert "11.00 ± 1.00" in text
    assert "2000 (1)" in text  # latency at the smallest batch, throughput at the best
    assert "2 (64)" in text
    assert "40%" in text
    assert "± is one standard error of the mean, over 2 seeds" in text
    assert "not the published figures of these names" in text


def test_orders_and_temperatures_are_no_seeds_of_each_other(tmp_path, capsys):
    rows = [quality(), quality(order="raster", fd=20.0), quality(seed=1, fd=12.0)]
    hot = [teacher(8, 10, fd) for fd in (30.0, 40.0)]
    hot[1]["draw"] = {**hot[1]["draw"], "temperature": 0.9}
    assert sorted(len(group) for group in by_setting([*rows, *hot])) == [1, 1, 1, 2]
    print_results(write(tmp_path / "orders.json", rows))
    out = capsys.readouterr().out
    assert "11.00 ± 1.00" in out
    assert all(f"│ {order}" in out for order in ("spread", "raster"))
