"""Results files compared, quality against time, and the commands that measure: evaluate, bench, sweep, compare."""

import dataclasses
import hashlib
import subprocess

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image

from marval.config import Chain, OneStep
from marval.evaluate.compare import compare
from marval.evaluate.images import SHARD
from marval.evaluate.metrics import METRICS
from marval.evaluate.pareto import best_within, points_of, sweep_table, unbeaten, verdicts
from marval.evaluate.plots import draw_pareto, draw_sweep
from marval.evaluate.results import check_measure, check_names, read_results, write_results
from marval.evaluate.throughput import best_batch, memory_of, summary
from marval.pipeline import Pipeline
from marval.runtime import provenance
from processes import marval
from result_rows import quality, teacher, timed, write, write_curve
from tiny import tiny_config, tiny_model


def test_compare_says_what_differs_and_whether_it_is_more_than_chance(tmp_path):
    first = write(tmp_path / "a.json", [quality(seed=s, fd=f) for s, f in ((0, 10.0), (1, 11.0), (2, 12.0))])
    rows = [quality(seed=s, fd=f, sha256="b" * 64, accuracy=0.8) for s, f in ((0, 12.0), (1, 12.5), (2, 13.0))]
    second = write(tmp_path / "b.json", [*rows, quality(k=16)])
    said, found = compare(first, second)
    figures = {difference.figure: difference for difference in found}
    assert figures["fd"].first == pytest.approx(11.0)
    assert figures["fd"].second == pytest.approx(12.5)
    low, high = scipy.stats.ttest_rel([10.0, 11.0, 12.0], [12.0, 12.5, 13.0]).confidence_interval(0.95)
    assert figures["fd"].chance == pytest.approx((high - low) / 2, rel=1e-3)  # the same seeds: pairs
    assert figures["fd"].counts == (3, 3)
    assert figures["fd"].verdict == "a difference"
    assert figures["accuracy"].verdict == "a difference"  # nothing varies over the seeds
    assert any("sha256" in line and "a" * 64 in line and "b" * 64 in line for line in said)
    assert any(line == f"only in {second}: s K=16, 100 samples" for line in said)
    _, same = compare(first, first)
    assert {difference.verdict for difference in same} == {"the same"}
    one = write(tmp_path / "one.json", [quality("tuned", fd=9.0)])  # one model each: compared under different names
    _, alone = compare(write(tmp_path / "other.json", [quality()]), one)
    assert alone[0].verdict == "no telling from one seed on each side, measure several (--seed 0 1 2)"


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ([10.0], [99.0], "no telling"),
        ([10.0, 10.2], [12.0], "no more than chance"),  # 2 seeds hardly know their own spread
        ([10.0, 10.2, 9.9], [10.9], "a difference"),
        ([10.0, 10.2], [12.0, 11.8], "no more than chance"),
        ([10.0, 12.0, 14.0], [10.5, 12.6, 14.5], "a difference"),  # by pairs only: the seeds differ by more
        ([10.0, 10.4, 9.7, 10.1, 10.3, 9.8], [10.6, 10.2, 10.9, 10.7, 10.3, 10.5], "no more than chance"),
        ([10.0, 10.2, 9.9], [10.1, 10.0, 10.3], "no more than chance"),
    ],
)
@pytest.mark.parametrize("shared", [True, False])
def test_the_verdict_is_that_of_students_t_test(first, second, verdict, shared, tmp_path):
    """Paired where both sides have the same seeds; else with one variance for both sides."""
    files = [
        write(tmp_path / f"{name}.json", [quality(seed=start + seed, fd=fd) for seed, fd in enumerate(values)])
        for name, start, values in (("a", 0, first), ("b", 0 if shared else 100, second))
    ]
    _, (difference, _) = compare(*files)
    assert difference.figure == "fd"
    assert difference.counts == (len(first), len(second))
    if len(first) + len(second) == 2:
        assert difference.chance is None
        return
    paired = shared and len(first) == len(second)
    result = (scipy.stats.ttest_rel if paired else scipy.stats.ttest_ind)(first, second)
    assert (result.pvalue < 0.05) == (difference.verdict == "a difference")
    low, high = result.confidence_interval(0.95)
    assert difference.chance == pytest.approx((high - low) / 2, rel=1e-3)
    assert difference.verdict == verdict or not shared


def test_times_differ_where_their_rounds_do_not_overlap(tmp_path):
    def file(name, **changes):
        row = timed(quality(), 1.0) | {"fastest": 0.9, "slowest": 1.2, "repeats": 3} | changes
        return write(tmp_path / name, [], [row])

    base = file("base.json")
    for name, verdict, changes in (
        ("apart", "a difference", {"seconds_per_image": 1.4, "fastest": 1.21, "slowest": 1.5}),
        ("over", "no more than chance", {"seconds_per_image": 1.4, "fastest": 1.19, "slowest": 1.5}),
        ("faster", "a difference", {"seconds_per_image": 0.8, "fastest": 0.7, "slowest": 0.89}),
        ("once", "no telling from a single round", {"seconds_per_image": 9.0, "repeats": 1}),
    ):
        (difference,) = compare(base, file(f"{name}.json", **changes))[1]
        assert difference.verdict.startswith(verdict)
        assert difference.what == "rounds"


def test_a_teacher_and_a_student_compare_where_each_file_holds_one(tmp_path):
    a = write(tmp_path / "t.json", [teacher(8, 100, fd, seed=s) for s, fd in ((0, 12.0), (1, 12.1), (2, 11.9))])
    b = write(tmp_path / "s.json", [quality(seed=s, fd=fd) for s, fd in ((0, 9.0), (1, 9.1), (2, 9.2))])
    said, found = compare(a, b)
    assert found[0].setting == "t K=8, T=100, w=3, 100 samples, against s"
    assert (found[0].verdict, found[0].counts) == ("a difference", (3, 3))
    assert any("draw" in line for line in said)
    several = write(tmp_path / "two.json", [teacher(8, 100, 12.0), teacher(8, 10, 30.0)])
    with pytest.raises(ValueError, match="share no setting"):  # which of the two chains?
        compare(several, b)


def rewarded(seed, **rewards):
    scores = {name: {"mean": mean, "standard_error": error} for name, (mean, error) in rewards.items()}
    return quality(seed=seed, prompt="a {}", rewards=scores)


def test_rewards_compare_by_their_standard_errors(tmp_path):
    """Two seeds of 100 images each against one: 1.96 times the standard error of the difference of their means."""
    for name, rows in (
        ("a", [rewarded(0, clip=(20.0, 0.3)), rewarded(1, clip=(20.4, 0.4))]),
        ("b", [rewarded(0, clip=(21.0, 0.6), other=(1.0, 0.1))]),
        ("c", [rewarded(0, clip=(21.6, 0.6))]),
    ):
        write_results(tmp_path / f"{name}.json", "rewards", rows, 0)
    (one,) = compare(tmp_path / "a.json", tmp_path / "b.json")[1]
    assert (one.figure, one.first, one.second, one.counts) == ("clip", pytest.approx(20.2), 21.0, (200, 100))
    assert one.chance == pytest.approx(1.96 * (0.25**2 + 0.6**2) ** 0.5)
    assert one.verdict == "no more than chance"
    (other,) = compare(tmp_path / "a.json", tmp_path / "c.json")[1]
    assert other.verdict == "a difference"


def test_rewards_of_other_weights_do_not_compare(tmp_path):
    for name, digest in (("a", "1"), ("b", "2")):
        row = rewarded(0, clip=(20.0, 0.3))
        row["rewards"]["clip"]["sha256"] = digest * 64
        write_results(tmp_path / f"{name}.json", "rewards", [row], 0)
    with pytest.raises(ValueError, match=r"rewards clip with weights 1+ and 2+: these do not compare"):
        compare(tmp_path / "a.json", tmp_path / "b.json")


def test_benches_compare_at_the_same_precision(tmp_path):
    row = timed(quality(), 1.0) | {"repeats": 3}
    write_results(tmp_path / "a.json", "bench", [row | {"autocast": True, "seconds_per_image": 0.4}, row], 0)
    write_results(tmp_path / "b.json", "bench", [row | {"seconds_per_image": 3.0, "fastest": 2.9, "slowest": 3.1}], 0)
    said, (difference,) = compare(tmp_path / "a.json", tmp_path / "b.json")
    assert (difference.first, difference.second, difference.verdict) == (1.0, 3.0, "a difference")
    assert f"only in {tmp_path / 'a.json'}: s K=8, batch 1, bf16" in said


def test_compare_refuses_what_does_not_compare(tmp_path):
    first = write(tmp_path / "a.json", [quality()])
    other = write(tmp_path / "features.json", [quality(features="my:net")])
    with pytest.raises(ValueError, match="features 'E' and 'my:net'"):
        compare(first, other)
    with pytest.raises(ValueError, match=r"data_sha256 'd+' and 'e+'"):
        compare(first, write(tmp_path / "data.json", [quality(data_sha256="e" * 64)]))
    with pytest.raises(ValueError, match="share no setting"):
        compare(first, write(tmp_path / "k.json", [quality(k=3)]))
    with pytest.raises(ValueError, match=r"nowhere\.json is not there"):
        compare(first, tmp_path / "nowhere.json")


def test_two_models_under_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two different models are named s"):
        check_names([("s", "a"), ("s", "b")])
    check_names([("s", "a"), ("s", "a"), ("t", "b")])
    with pytest.raises(ValueError, match="other weights named s"):
        check_names([("s", "x")], [quality()], tmp_path)


def test_a_results_file_holds_one_kind_of_features_and_one_data_set(tmp_path):
    check_measure({"features": "E", "data_sha256": "d" * 64}, [quality()], tmp_path)
    with pytest.raises(ValueError, match="has features 'E', expected 'my:net'"):
        check_measure({"features": "my:net"}, [quality()], tmp_path)


def test_points_join_quality_and_time_and_know_who_beats_whom(tmp_path):
    curve = write_curve(tmp_path)
    points = points_of(curve, part="timing", batch=1)
    assert [p.label for p in points] == [
        "s K=4", "s K=8", "t K=8, T=100, w=3", "t K=16, T=100, w=3", "t K=8, T=10, w=3", "t K=16, T=10, w=3",
    ]  # fmt: skip
    assert points[1].fd == pytest.approx(9.25)
    assert points[1].seeds == 2
    assert [p.label for p in unbeaten(points[2:], points[:2])] == ["t K=16, T=100, w=3"]
    assert verdicts(points) == ["s does not beat t K=16, T=100, w=3"]
    assert verdicts([p for p in points if p.iterations != 16]) == ["s lies left-below of all 2 points of the teacher"]
    assert best_within(points, 0.03) == "best within 0.03 s an image: s K=4: FD on E 12.00 in 0.02 s"
    assert "t K=16, T=100" in best_within(points, 5.0)
    assert best_within(points, 0.001).startswith("none draws an image in 0.001 s: the fastest is s K=4")
    assert "| t | 16 | 100 | 3 | 8.00 | 0.9000 | 2000.00 |" in sweep_table(points)
    assert points_of(curve, part="timing", batch=64) == []
    for draw, name in ((draw_pareto, "p.png"), (draw_sweep, "s.png")):
        draw(points, tmp_path / name, 1)
        with Image.open(tmp_path / name) as picture:
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20)) > 20


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
        write_results(file, "bench", order, 0)
        (point,) = points_of(file, part="bench", batch=1, report=said.append)
        assert (point.seconds, point.fd, point.measure) == (0.1, 2.5, "FID")
    assert said == []
    for alone in (times[1:2], times[3:4], times[4:5]):
        write_results(file, "bench", alone, 0)
        assert points_of(file, part="bench", batch=1, report=said.append) == []
        assert said.pop() == "left out, timed in another precision, compiled or without decoding: s K=8"
    assert len(points_of(file, part="bench", batch=1, mixed=True)) == 1  # older results have no others
    write_results(file, "bench", times[2:3], 0)
    assert points_of(file, part="bench", batch=1) == []  # of other weights


def test_points_have_equal_numbers_of_samples_and_times_of_one_machine(tmp_path):
    """A Fréchet distance falls with the number of samples: the student's 10,000 are left out against the rest's 100."""
    rows = [teacher(8, 100, 10.0), teacher(16, 100, 8.0), quality(fd=9.0), quality(fd=5.0, samples=10_000)]
    times = [timed(row, 1.0) | {"made": {"device": "cpu", "threads": 2}} for row in rows[:3]]
    file, said = write(tmp_path / "r.json", rows, times), []
    points = points_of(file, part="timing", batch=1, report=said.append)
    assert {(p.label, p.fd, p.samples) for p in points} == {
        ("t K=8, T=100, w=3", 10.0, 100), ("t K=16, T=100, w=3", 8.0, 100), ("s K=8", 9.0, 100),
    }  # fmt: skip
    assert said == ["left out, with other numbers of samples, precision or metrics than most: 1 settings"]
    assert [p.fd for p in points_of(file, part="timing", batch=1, samples=10_000)] == [5.0]
    write_results(file, "timing", [*times[:2], times[2] | {"made": {"device": "cuda", "threads": 2}}], 0)
    assert [p.label for p in points_of(file, part="timing", batch=1, report=said.append)] == ["s K=8"]
    assert said[1].startswith("2 of 3 times are left out: they are of another machine")


def test_the_best_batch_is_where_a_larger_one_gains_nothing():
    assert best_batch(lambda batch: 1.0 if batch <= 16 else batch / 16) == 16
    assert best_batch(lambda batch: float(batch)) == 1
    assert best_batch(lambda batch: 1e-3, most=64) == 64
    assert best_batch(lambda batch: 30.0) == 1  # a run of minutes is not tried larger


def test_memory_is_the_weights_and_what_grows_with_the_batch():
    for draw in (Chain(guidance=2.0, diffusion_steps=3), OneStep()):
        pipeline = Pipeline(tiny_model(), dataclasses.replace(tiny_config(), draw=draw))
        weights = sum(4 * p.numel() for p in pipeline.model.parameters())
        one, many = memory_of(pipeline, 4, 1, False), memory_of(pipeline, 4, 32, False)
        assert weights < one < many
        hidden = 32 * tiny_config().mar.num_tokens * tiny_config().mar.encoder_dim * 4
        assert many - weights > hidden


def test_a_benchs_summary_takes_latency_and_the_best_throughput():
    row = timed(teacher(8, 100, 1.0), 2.0) | {"gflops_per_image": 3.0, "fraction_of_peak": 0.1, "memory_bytes": 2**21}
    table = summary(
        [row, row | {"batch": 64, "seconds_per_image": 0.5, "memory_bytes": 2**23, "fraction_of_peak": 0.4}]
    )
    assert "| t | 100 | 3.0 | 8 | 2000 (1800 to 2400) | 2 (64) | 3 | 8 | 40% |" in table


def test_the_commit_says_when_the_code_differs_from_it(tmp_path, monkeypatch):
    def git(*arguments):
        told = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(["git", *told, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    commit = provenance.commit.__wrapped__
    git("init", "-q")
    git("commit", "-qm", "theirs", "--allow-empty")
    (tmp_path / "provenance.py").write_text("a = 1")
    assert commit() == "not a checkout"  # installed in a folder of somebody else's repository
    git("add", ".")
    git("commit", "-qm", "first")
    assert commit() == git("rev-parse", "HEAD")
    (tmp_path / "results.json").write_text("{}")  # what the command itself writes is no code
    assert commit() == git("rev-parse", "HEAD")
    (tmp_path / "provenance.py").write_text("a = 2")
    assert commit() == git("rev-parse", "HEAD") + "-dirty"


# The commands


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny teacher and student of pictures in a folder."""
    root = tmp_path_factory.mktemp("work")
    for name in ("cross", "square"):
        (root / "pictures" / name).mkdir(parents=True)
        for i in range(8):
            array = torch.randint(0, 255, (8, 8), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
            Image.fromarray(array.numpy()).save(root / "pictures" / name / f"{i}.png")
    config = dataclasses.replace(tiny_config(), data="folder:pictures")
    Pipeline(tiny_model(), config).save(root / "teacher")
    (root / "bright.py").write_text("def bright(images, prompts): return images.mean(dim=(1, 2, 3))\n")
    write_results(root / "other.json", "bench", [timed(quality("student"), 1.0) | {"sha256": "f" * 64}], 0)
    for name, seed in (("student", 0), ("impostor", 1)):
        Pipeline(tiny_model(seed), dataclasses.replace(config, draw=OneStep(), name="student")).save(root / name)
    return root


def test_evaluate_measures_teachers_at_several_t_and_draws_the_curve(work):
    done = marval(
        "evaluate", "teacher", "student", "--iterations", 2, 4, "--diffusion-steps", 2, 5, "--batches", 1, 2,
        "--repeats", 1, "--samples", 8, "--plot", "curve.png", "--out", "bench.json", cwd=work,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = read_results(work / "bench.json")["timing"]["rows"]
    assert len(rows) == 2 * 2 * 3
    assert {row["draw"].get("diffusion_steps") for row in rows} == {5, 2, None}
    assert all(len(row["sha256"]) == 64 and row["made"]["device"] for row in rows)
    assert len(points_of(work / "bench.json", part="timing", batch=1)) == 6
    assert "8 images are fewer than 1280 features" in done.stdout
    assert Image.open(work / "curve.png").size[0] > 500


def test_two_processes_evaluate_as_one_and_say_what_made_the_row(work):
    count = SHARD + 10  # each process draws a shard
    for processes in (1, 2):
        done = marval(
            "evaluate", "student", "--iterations", 2, "--samples", count, "--batches",
            "--keep-images", f"drawn-{processes}", "--image-format", "png", "--out", f"{processes}.json",
            cwd=work, processes=processes,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        (row,) = read_results(work / f"{processes}.json")["quality"]["rows"]
        names = ("kid", "precision", "recall", "density", "coverage")
        assert {"fd", "diversity", "fd_bias", *(f"efficientnet_{name}" for name in names)} <= set(row)
        assert row["metrics"] == METRICS
        assert len(row["sha256"]) == len(row["data_sha256"]) == 64
        assert {"command", "commit", "device", "versions", "processes", "threads"} == set(row["made"])
        assert (row["made"]["processes"], row["made"]["threads"]) == (processes, 1)
        assert len(list(work.glob(f"drawn-{processes}/*/png/*.png"))) == count
    _, found = compare(work / "1.json", work / "2.json")
    assert {difference.verdict for difference in found} == {"the same"}


def test_images_of_rows_that_are_measured_are_drawn_and_exported(work):
    arguments = ("evaluate", "student", "--iterations", 2, 2, "--samples", 6, "--batches", "--out", "kept.json")
    for kept in ((), ("--keep-images", "kept", "--image-format", "npz")):
        done = marval(*arguments, *kept, cwd=work)
        assert done.returncode == 0, done.stderr
        assert len(read_results(work / "kept.json")["quality"]["rows"]) == 1
    (archive,) = work.glob("kept/*/images.npz")
    with np.load(archive) as content:
        assert content["arr_0"].shape == (6, 8, 8, 3)
        assert content["arr_1"].tolist() == [0, 1] * 3
    done = marval("evaluate", "student", "--rewards", "bright:bright", "--iterations", 2, "--samples", 6,
                  "--keep-images", "kept", "--out", "rewards.json", cwd=work)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = read_results(work / "rewards.json")["rewards"]["rows"]
    assert row["rewards"]["bright:bright"]["mean"] == pytest.approx(content_mean(archive), rel=1e-4)
    assert row["rewards"]["bright:bright"]["sha256"] == hashlib.sha256((work / "bright.py").read_bytes()).hexdigest()
    assert len(list((work / "kept").iterdir())) == 1  # the same images
    (work / "bright.py").write_text((work / "bright.py").read_text() + "# changed")
    done = marval("evaluate", "student", "--rewards", "bright:bright", "--iterations", 2, "--samples", 6, "--out",
                  "rewards.json", cwd=work)  # fmt: skip
    assert done.returncode == 2
    assert "rewards.json holds figures of a reward bright:bright with other weights" in done.stderr


def content_mean(archive):
    with np.load(archive) as content:
        return content["arr_0"].mean() / 255


def test_sweep_and_compare_run(work):
    done = marval(
        "evaluate", "teacher", "--iterations", 2, 4, "--guidance", 1, 2, "--diffusion-steps", 3, "--samples", 8,
        "--budget", 60, "--batches", 1, "--repeats", 1, "--plot", "sweep.png", "--out", "sweep.json",
        cwd=work, processes=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "best within 60 s an image: tiny K=" in done.stdout
    assert (work / "sweep.png").is_file()
    done = marval("compare", "sweep.json", "sweep.json", cwd=work)
    assert done.returncode == 0, done.stderr
    assert "the same" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("evaluate", "student", "--guidance", 2), ("guidance", "baked in")),
        (("evaluate", "student", "impostor"), ("two different models are named student",)),
        (
            ("evaluate", "student", "--reference", "adm.npz"),
            ("adm.npz", "openaipublic", "SHA-256 b32732719497"),
        ),
        (("compare", "a.json", "b.json"), ("a.json is not there",)),
        (("evaluate", "imagenet256-base", "student"), ("random weights",)),
        (("evaluate", "student", "--samples", 1), ("--samples 1", "at least 2")),
        (("evaluate", "student", "--iterations", 99), ("--iterations 99", "1 to 16")),
        (("evaluate", "student", "--repeats", -1), ("--repeats -1",)),
        (("evaluate", "student", "--rewards", "classifier", "--judge", "j"), ("--judge", "not with --rewards")),
        (("evaluate", "student", "--image-format", "png"), ("--keep-images DIR",)),
        (("evaluate", "student", "--judge", "fashion-judge"), ("--judge tells t-shirt", "cross, square")),
        (("evaluate", "student", "fashion-student"), ("fashion-student and student draw other classes",)),
        (("evaluate", "student", "--iterations", 2, "--out", "other.json"), ("other weights named student",)),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_bad_input_is_refused_in_one_line(work, arguments, words):
    done = marval(*arguments, cwd=work)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
