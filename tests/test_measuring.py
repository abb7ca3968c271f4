"""The verbs that measure and draw: what they refuse before work, what they never lose, drop or overwrite."""

import dataclasses
import json
import re
import sys
import time

import pytest
import torch
from PIL import Image

from marval import progress as shown
from marval.cli import main
from marval.cli.arguments import usable_device
from marval.config import Chain, OneStep
from marval.evaluate.evaluate import evaluate, time_models
from marval.evaluate.features import Statistics, diversity_within_class, find_features
from marval.evaluate.images import draw_bytes
from marval.evaluate.judge import Judge, load_judge
from marval.evaluate.metrics import METRICS, RealSample
from marval.evaluate.probe import probe
from marval.evaluate.results import merge_results, read_results
from marval.evaluate.timing import in_turns
from marval.pipeline import Pipeline
from marval.rewards.classifier import Classifier
from marval.runtime.rng import generator
from processes import marval
from tiny import tiny_config, tiny_data, tiny_model

FEATURES = "plain_features:rows"


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with a tiny teacher and student, pictures of their two classes, and features that cost nothing."""
    data = tiny_data()
    for i, (image, label) in enumerate(zip(data.images[:16], data.labels[:16].tolist(), strict=True)):
        folder = tmp_path / "pictures" / data.class_names[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder / f"{i}.png")
    config = dataclasses.replace(tiny_config(), data="folder:pictures")
    Pipeline(tiny_model(), config).save(tmp_path / "teacher")
    Pipeline(tiny_model(), dataclasses.replace(config, draw=OneStep(), name="student")).save(tmp_path / "student")
    (tmp_path / "plain_features.py").write_text(
        "def rows(images): return images.float().mean(dim=(1, 3))\ndef flat(images): return images.float().flatten()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("plain_features", None)


@pytest.fixture
def run(work, monkeypatch, capsys):
    """marval in this process: exit code, standard output, standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["marval", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def refused(result, *words):
    code, _, error = result
    assert code == 2
    assert error.count("\n") == 1, error
    assert all(word in error for word in words), error


def measuring(*more, model="student", samples=8, features=FEATURES):
    plain = ("--iterations", 2, "--samples", samples, "--batches", "--features", features)
    return ("evaluate", model, *plain, *more)


# Before the first picture is drawn


@pytest.fixture
def nothing_drawn(monkeypatch):
    def draws(*_, **__):
        raise AssertionError("drew first")

    monkeypatch.setattr(Pipeline, "sample_tokens", draws)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (measuring("--out", "pictures"), ("pictures", "folder")),
        (measuring("--out", "student/config.json"), ("not a results file",)),
        (measuring("--out", "teacher/model.safetensors"), ("not a results file",)),
        (measuring("--out", "student/config.json/a.json"), ("a.json",)),
        (measuring("--batch-size", 0), ("--batch-size 0",)),
        (measuring(samples=1), ("--samples 1", "at least 2")),
        (measuring(samples=5), ("--samples 5", "at least 6")),
        (measuring(samples=1_000_001), ("1,000,000",)),
        (measuring("--iterations", 17), ("--iterations 17", "1 to 16")),
        (measuring(features="plain_features:flat"), ("plain_features:flat", "features)")),
        (measuring("--data", "folder:nowhere"), ("nowhere",)),
        (measuring("--judge", "nowhere"), ("nowhere",)),
        (measuring("--reference", "nowhere.npz"), ("nowhere.npz",)),
        (measuring("--keep-images", "pictures/cross/0.png"), ("0.png",)),
        (measuring(model="nowhere"), ("nowhere",)),
        (measuring("--batches", 1, "--plot", "pictures"), ("pictures", "folder")),
        (("evaluate", "student", "--samples", 8, "--plot", "student/config.json/p.png"), ("p.png",)),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_drawn(run, nothing_drawn, arguments, words):
    refused(run(*arguments), *words)


def test_too_few_real_images_are_refused_with_the_number_that_is_needed(run, work, nothing_drawn):
    for name in ("cross", "square"):
        for path in sorted((work / "pictures" / name).iterdir())[2:]:
            path.unlink()
    refused(run(*measuring("--data", "folder:pictures")), "at least 6", "--data")
    with pytest.raises(ValueError, match="1 real images: a Fréchet distance needs at least 2"):
        Statistics.of([torch.ones(1, 3)])


def test_a_folder_of_others_is_not_taken_for_images(run, work, nothing_drawn):
    kept = work / "drawn" / "student-K2-seed0-8"
    kept.mkdir(parents=True)
    (kept / "shard-00000.safetensors").write_text("mine")
    refused(run(*measuring("--keep-images", "drawn")), "holds files but no plan.json", "another --keep-images")
    assert (kept / "shard-00000.safetensors").read_text() == "mine"
    (kept / "plan.json").write_text("[]")
    refused(run(*measuring("--keep-images", "drawn")), "plan.json is damaged")


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "null", "{", '{"quality": 1}', '{"quality": []}', '{"quality": {}}', '{"quality": {"rows": {}}}',
        '{"quality": {"rows": [1]}}', '{"quality": {"rows": [{}]}}', '{"quality": {"quality": {"rows": []}}}',
        '{"timing": {"rows": [{"model": "s", "draw": {}, "iterations": 4, "batch": 1}]}}', '{"unknown": {"rows": []}}',
        '{"quality": {"rows": [{"model": "s", "draw": 3, "iterations": 4, "samples": 2}]}}', "[" * 100_000,
        '{"quality": {"rows": [{"model": "s", "draw": {}, "iterations": 4, "samples": 2, "fd": NaN}]}}', "\x00\xff",
    ],
)  # fmt: skip
def test_what_is_no_results_file_is_refused_in_one_line(tmp_path, text):
    file = tmp_path / "r.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"r\.json is not a results file \([^\n]*\): choose another --out$"):
        read_results(file)


# Rows


def row(k, **changes):
    made = {"model": "s", "teacher": False, "draw": {}, "order": "spread", "sha256": "a", "iterations": k}
    return {**made, "samples": 8, "seed": 0, "autocast": False, "metrics": METRICS, "fd": 1.0, **changes}


def test_two_commands_on_one_file_lose_no_row(tmp_path):
    """Four processes write ten rows each, one at a time, into one file."""
    import multiprocessing

    out = tmp_path / "r.json"
    work = [multiprocessing.get_context("fork").Process(target=write_ten, args=(out, first)) for first in range(4)]
    for process in work:
        process.start()
    for process in work:
        process.join()
    rows = read_results(out)["quality"]["rows"]
    assert sorted(r["iterations"] for r in rows) == list(range(40))
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def write_ten(out, first):
    for k in range(10):
        merge_results(out, "quality", [row(10 * first + k)])


def test_rows_replace_their_own_kind_and_refuse_other_weights(tmp_path):
    out = tmp_path / "r.json"
    merge_results(out, "quality", [row(2, fd=1.0), row(3, fd=2.0), row(2, seed=1, fd=3.0)])
    merge_results(out, "quality", [row(2, fd=5.0)])
    assert sorted(r["fd"] for r in read_results(out)["quality"]["rows"]) == [2.0, 3.0, 5.0]
    with pytest.raises(ValueError, match="other weights named s"):
        merge_results(out, "quality", [row(4, sha256="b")])
    with pytest.raises(ValueError, match="expected 'other'"):
        merge_results(out, "quality", [row(4, features="other")])
    for name in ("clip", "other"):  # two commands that score the same images by different rewards
        merge_results(out, "rewards", [row(2, prompt="{}", rewards={name: {"mean": 1.0, "standard_error": 0.1}})])
    (scored,) = read_results(out)["rewards"]["rows"]
    assert set(scored["rewards"]) == {"clip", "other"}


def plain_judge(classifier=None, sample=None):
    network = find_features(FEATURES)
    real = torch.rand(64, 8, generator=generator("real")) * 255
    return Judge(network, Statistics.of([real], network.name), classifier, sample)


def saved(work):
    return [(work / "student", Pipeline(tiny_model(), dataclasses.replace(tiny_config(), draw=OneStep(), name="s")))]


def test_a_row_that_another_command_writes_meanwhile_stays(work):
    out, models = work / "r.json", saved(work)
    figures = {"samples": 6, "out": out, "report": lambda line: None}

    def another(line):
        if line.startswith("s K=2"):
            evaluate(models, plain_judge(), iterations=(5,), **figures)

    rows = evaluate(models, plain_judge(), iterations=(2, 3), **figures | {"report": another})
    assert sorted(r["iterations"] for r in rows) == [2, 3, 5]


def test_a_row_of_other_metrics_is_measured_again(work):
    out, models = work / "r.json", saved(work)
    settings = {"iterations": (2,), "samples": 6, "out": out}
    (first,) = evaluate(models, plain_judge(), **settings, report=lambda line: None)
    assert first["metrics"] == METRICS
    for changes in ({"metrics": METRICS + 1}, {"metrics": None}):
        content = json.loads(out.read_text())
        (old,) = content["quality"]["rows"]
        old.update(fd=123.0, **changes)
        if changes["metrics"] is None:
            del old["metrics"]
        out.write_text(json.dumps(content))
        (again,) = evaluate(models, plain_judge(), **settings, report=lambda line: None)
        assert again["fd"] == first["fd"]
        assert again["metrics"] == METRICS
    said = []
    evaluate(models, plain_judge(), **settings, report=said.append)
    assert said == []  # done


def test_times_are_in_the_precision_of_the_figures_and_say_what_is_in_them(work):
    out = work / "r.json"
    rows = time_models(saved(work), iterations=(2,), batches=(1,), repeats=1, out=out, autocast=True, report=str)
    assert [(r["autocast"], r["decoded"], r["repeats"]) for r in rows] == [(True, True, 1)]
    assert len(time_models(saved(work), iterations=(2,), batches=(1,), repeats=1, out=out, report=str)) == 1
    assert [r["autocast"] for r in read_results(out)["timing"]["rows"]] == [True, False]


def test_every_timing_waits_for_the_device_before_and_after(monkeypatch):
    said = []
    monkeypatch.setattr("marval.evaluate.timing.synchronize", lambda device: said.append("wait"))
    monkeypatch.setattr("marval.evaluate.timing.SHORTEST", 0.0)
    in_turns([lambda: said.append("job")], 2, torch.device("cpu"))
    assert said == ["wait", "job", "wait"] * 3


# Figures


def test_diversity_counts_every_image_of_a_class():
    """600 images: the first 200 of a class are alike, the rest are not."""
    features = torch.randn(1200, 5, generator=generator("diversity"))
    features[:400] = 0
    labels = torch.arange(1200) % 2
    expected = torch.stack([torch.pdist(features[labels == c].double()).mean() for c in (0, 1)]).mean()
    assert diversity_within_class(features, labels) == pytest.approx(float(expected), rel=1e-9)
    many = torch.randn(2300, 3, generator=generator("rows"))  # more rows than are done at a time
    expected = float(torch.pdist(many.double()).mean())
    assert diversity_within_class(many, torch.zeros(2300)) == pytest.approx(expected, rel=1e-9)
    assert diversity_within_class(torch.full((50, 3), 7.1), torch.zeros(50)) == pytest.approx(0, abs=1e-6)


def broken_pipeline(draw):
    model = tiny_model()
    model.head.final_layer.linear.bias.data[0] = float("nan")
    return Pipeline(model, dataclasses.replace(tiny_config(), draw=draw, name="broken"))


@pytest.mark.parametrize("draw", [OneStep(), Chain(guidance=1.5, diffusion_steps=4)])
def test_a_model_that_draws_nan_is_no_model_that_draws_black(work, run, draw):
    pipeline = broken_pipeline(draw)
    with pytest.raises(ValueError, match=r"not finite|finite"):
        draw_bytes(pipeline, 4, 2, seed=3)
    pipeline.config = dataclasses.replace(pipeline.config, data="folder:pictures")
    pipeline.save(work / "broken")
    refused(run(*measuring(model="broken")), "diffloss.net.final_layer.linear.bias holds values that are not finite")
    assert not read_results(work / "results/evaluate.json")


def test_a_judge_that_says_nan_is_no_judge_that_says_something(work):
    """Its accuracy would be that of class 0, everywhere."""
    classifier = Classifier("plain", 1, ("cross", "square")).eval()
    next(classifier.parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"(accuracy|log_probability) of seed 0, class cross is not finite \(6 of 6"):
        evaluate(saved(work), plain_judge(classifier), iterations=(2,), samples=6, out=work / "r.json", report=str)
    with pytest.raises(ValueError, match=r"accuracy of 64 images is nan"):
        plain_judge(classifier).figures(tiny_data().images, tiny_data().labels)


def test_only_an_undefined_diversity_is_left_out_and_said_so(work, monkeypatch):
    said = []
    (one,) = evaluate(saved(work), plain_judge(), iterations=(2,), samples=2, out=work / "r.json", report=said.append)
    assert "diversity" not in one
    assert any("no diversity, which needs two images of a class" in line for line in said)
    monkeypatch.setattr("marval.evaluate.judge.frechet_distance", lambda *_: float("nan"))
    with pytest.raises(ValueError, match="fd of 6 images is nan"):
        evaluate(saved(work), plain_judge(), iterations=(2,), samples=6, out=work / "r.json", report=str)


def test_a_probe_of_training_warns_once_of_its_bias_and_refuses_too_few_images(work):
    said = []
    look = probe(plain_judge(), 4, 2, report=said.append)
    assert [line.split(":")[0] for line in said] == ["warning"]
    assert "4 images are fewer than 8 features" in said[0]
    look(saved(work)[0][1])
    assert len(said) == 1
    with pytest.raises(ValueError, match="--probe-samples 1: expected at least 2"):
        probe(plain_judge(), 1, 2)


def test_a_damaged_cache_of_real_features_is_made_again(work):
    data = tiny_data()
    first = load_judge("folder:x", None, lambda: data, features=FEATURES, sample=40)
    kernel = first.sample().kernel
    for file in (work / "cache/marval").iterdir():
        file.write_bytes(file.read_bytes()[:20])
    again = load_judge("folder:x", None, lambda: data, features=FEATURES, sample=40)
    assert again.sample().kernel == kernel
    assert torch.equal(again.real.mean, first.real.mean)


def test_the_batch_size_changes_no_image_and_is_kept(work, monkeypatch):
    drawn, sample = [], Pipeline.sample

    def watched(self, classes, **settings):
        drawn.append(len(classes))
        return sample(self, classes, **settings)

    monkeypatch.setattr(Pipeline, "sample", watched)
    settings = {"iterations": (2,), "samples": 7, "report": str}
    figures = [
        evaluate(saved(work), plain_judge(), out=work / f"{size}.json", batch_size=size, **settings)[0]["fd"]
        for size in (None, 3)
    ]
    assert drawn == [7, 3, 3, 1]
    assert figures[0] == pytest.approx(figures[1])


def test_a_sample_of_real_images_says_how_many_it_needs():
    with pytest.raises(ValueError, match="5 real images: precision, recall, density and coverage need at least 6"):
        RealSample.of(torch.rand(5, 3))


# Pictures


def test_pictures_that_are_there_are_kept_unless_forced(run, work):
    draw = ("sample", "student", "--count", 3, "--iterations", 2)
    assert run(*draw)[0] == 0
    mine = work / "samples/00000-cross-0.png"
    mine.write_text("mine")
    refused(run(*draw), "00000-cross-0.png is there already, and 3 more files", "--force")
    assert mine.read_text() == "mine"
    assert run(*draw, "--force")[0] == 0
    assert Image.open(mine).size == (8, 8)


def test_many_pictures_are_saved_as_they_are_drawn(run, work, monkeypatch):
    sample = Pipeline.sample

    def fails_at_the_third(self, classes, *, seed, **settings):
        if seed >= 4:
            raise ValueError("no more")
        return sample(self, classes, seed=seed, **settings)

    monkeypatch.setattr(Pipeline, "sample", fails_at_the_third)
    refused(run("sample", "student", "--count", 5, "--batch-size", 2, "--iterations", 2), "no more")
    assert len(list((work / "samples").glob("*.png"))) == 4
    monkeypatch.undo()


def test_a_thousand_pictures_need_a_batch_of_memory(run, work, monkeypatch):
    """Each picture has its own seed, class and recipe, whatever the batch; the grid shows the first hundred."""
    monkeypatch.chdir(work)
    code, said, _ = run("sample", "student", "--count", 130, "--batch-size", 50, "--iterations", 1, "--seed", 5)
    assert code == 0
    assert said == "130 images and grid.png (the first 100) in samples\n"
    assert len(list((work / "samples").glob("0*.png"))) == 130
    assert run("sample", "student", "--like", "samples/00129-square-134.png", "--out", "again")[1].endswith(
        "pixel for pixel\n"
    )
    refused(run("sample", "student", "--batch-size", 0), "--batch-size 0")


def test_a_picture_that_is_checked_is_never_replaced(run, work):
    assert run("sample", "student", "--count", 1, "--iterations", 2)[0] == 0
    file = work / "samples/00000-cross-0.png"
    before = file.read_bytes()
    code, said, _ = run("sample", "student", "--like", file, "--out", "samples")
    assert code == 0
    assert "the same, pixel for pixel" in said
    assert file.read_bytes() == before
    with Image.open(file) as picture:
        from PIL.PngImagePlugin import PngInfo

        notes = PngInfo()
        notes.add_itxt("marval", picture.info["marval"])
        picture.point(lambda value: 255 - value).save(file, pnginfo=notes)
    changed = file.read_bytes()
    for more in ((), ("--force",)):
        refused(
            run("sample", "student", "--like", file, "--out", "samples", *more),
            "differs by up to",
            "nothing was written",
        )
        assert file.read_bytes() == changed
    code, said, _ = run("sample", "student", "--like", file, "--out", "other")
    assert code == 0
    assert "differs by up to" in said
    assert (work / "other" / file.name).is_file()
    refused(run("sample", "student", "--like", file, "--out", "other"), "is there already", "--force")


# Progress, devices, several processes


class Clock:
    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("marval.runtime.progress.time.monotonic", lambda: self.now)


def test_long_work_says_how_far_it_is_and_short_work_nothing(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    with shown.progress(10, "drawing images") as advance:
        for _ in range(10):
            clock.now += 0.5
            advance(1)
    assert capsys.readouterr() == ("", "")
    with shown.progress(10, "drawing images") as advance:
        for _ in range(10):
            clock.now += 12
            with shown.progress(5, "inner"):  # a terminal has room for one bar
                advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "drawing images: 3 of 10, 1 min 24 s left"
    assert len(lines) == 3
    with shown.progress(10, "drawing images", quiet=True) as advance:
        clock.now += 1000
        advance(5)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_after_two_seconds(monkeypatch):
    import io

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    clock = Clock(monkeypatch)
    for seconds, seen in ((0.1, False), (3.0, True)):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        with shown.progress(2, "drawing images") as advance:
            clock.now += seconds
            advance(1)
        assert ("drawing images" in terminal.getvalue()) == seen


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", "meta", "hpu", "privateuseone", "", "cpu:zero", "mps", "xla"])
def test_a_device_that_is_not_here_is_refused_in_one_line(name):
    with pytest.raises(ValueError, match=r"^--device [^\n]*: not here \([^\n]+\); expected auto, cpu or cuda$"):
        usable_device(name)


def test_auto_takes_the_accelerator_if_it_was_tested(monkeypatch, capsys):
    for kind, expected in (("cuda", "cuda"), ("mps", "cpu"), (None, "cpu")):
        found = None if kind is None else torch.device(kind)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available, found=found: found)
        assert usable_device("auto") == expected
    monkeypatch.setattr("marval.cli.arguments.TESTED", ())
    assert usable_device("cpu") == "cpu"
    assert "never tested on cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        measuring("--repeats", 0),  # refused by every process, before they know each other
        measuring("--out", "kept.json"),  # by the first alone: the others wait for it
    ],
    ids=["all", "one"],
)
def test_a_refusal_of_several_processes_is_said_once_and_ends_them_all(work, arguments, monkeypatch):
    kept = row(2, model="student", sha256="", features="others", draw={"kind": "one_step"})
    (work / "kept.json").write_text(json.dumps({"quality": {"rows": [{**kept, "sha256": None}]}}))
    began = time.monotonic()
    done = marval(*arguments, cwd=work, processes=3)
    assert done.returncode != 0
    assert done.stderr.count("marval: ") == 1, done.stderr
    assert done.stderr.count("Traceback") == 1  # torchrun's own
    codes = re.findall(r"exitcode  : (-?\d+)", done.stderr)  # torchrun stops (-15) who is late on a busy machine
    assert "2" in codes, done.stderr
    assert set(codes) <= {"2", "-15"}, done.stderr
    assert time.monotonic() - began < 120
