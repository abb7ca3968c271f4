"""Results as people read them: points of quality and time, the best within a budget, the curve, tables."""

import pytest
from PIL import Image

from marval.evaluate.report import best_within, plot_curve, points_of, print_results, print_table
from marval.evaluate.results import read_results
from result_rows import quality, teacher, timed, write, write_curve


def points(file, batch=1):
    results = read_results(file)
    return points_of(results["quality"], results["timing"], batch)


def test_points_join_quality_and_time(tmp_path):
    curve = points(write_curve(tmp_path))
    assert [str(p.setting) for p in curve] == [
        "t K=8, T=100, w=3", "t K=16, T=100, w=3", "t K=8, T=10, w=3", "t K=16, T=10, w=3", "s K=4", "s K=8",
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


def test_points_have_times_of_one_machine_and_fid_where_it_was_measured(tmp_path):
    rows = [teacher(8, 100, 10.0), quality() | {"fid": 2.5}]
    rows[1].pop("fd")
    times = [timed(row, 1.0) | {"made": {"device": device}} for row, device in zip(rows, ("cpu", "cuda"), strict=True)]
    (point,) = points(write(tmp_path / "r.json", rows, times))
    assert (point.setting.model, point.distance, point.measure) == ("s", 2.5, "FID")


def test_the_console_shows_quality_and_speed_and_what_they_mean(tmp_path, capsys):
    rows = [teacher(8, 100, 10.0), quality(seed=0), quality(seed=1, fd=12.0), quality(order="raster", fd=20.0)]
    speed = {"gflops_per_image": 3.0, "memory_bytes": 2**21}
    times = [timed(rows[0], 2.0) | speed, timed(rows[0], 0.5, batch=64) | speed]
    other = timed(rows[1], 0.3) | {"made": {"device": "cuda"}}
    print_results(write(tmp_path / "r.json", rows, [other, *times]))
    out = capsys.readouterr().out
    text = " ".join(out.split())
    assert "11.00 ± 1.00" in text
    assert all(f" {order} " in out for order in ("spread", "raster"))  # no seeds of each other
    assert "2000 (1)" in text  # latency at the smallest batch, throughput at the best
    assert "2 (64)" in text
    assert "± is one standard error of the mean, over 2 seeds" in text
    assert "not the published figures of these names" in text
    assert "Left out: 1 times of another machine" in text


@pytest.mark.parametrize("width", [80, 120])
def test_a_narrow_terminal_folds_titles_and_cuts_no_figure(width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("marval.evaluate.report.WIDTH", None)
    names = ["fashion-teacher", "fashion-student", "fashion-tuned"]
    header = ["model", "held-out log-probability", *(f"precision-EfficientNet {i}" for i in range(8))]
    print_table("results", header, [[name, *["-0.1234"] * 9] for name in names])
    out = capsys.readouterr().out
    assert all(name in out for name in names)
    assert out.count("-0.1234") == 27
