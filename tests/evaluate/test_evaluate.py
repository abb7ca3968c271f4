"""Quality and rewards: rows that are right, resume and hide no fault; the verb on one and two processes."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import torch

from marval.config import OneStep
from marval.evaluate.draw import SHARD, draw_bytes
from marval.evaluate.evaluate import Quality, measure, probe
from marval.evaluate.features import METRICS, Statistics, find_features
from marval.evaluate.judge import Judge, RewardJudge
from marval.evaluate.results import read_results
from marval.io.checkpoint import model_hash
from marval.pipeline import Pipeline
from marval.rewards.classifier import Classifier
from marval.runtime.rng import generator
from processes import marval
from result_rows import quality
from tiny import tiny_config, tiny_data, tiny_model
from workspace import FEATURES, refused

CPU = torch.device("cpu")


def measuring(*more, model="student", samples=8, features=FEATURES):
    plain = ("--iterations", 2, "--samples", samples, "--batches", "--features", features)
    return ("evaluate", model, *plain, *more)


def plain_judge(classifier=None, sample=None):
    network = find_features(FEATURES)
    real = torch.rand(64, 8, generator=generator("real")) * 255
    return Judge(network, Statistics.of([real], network.name), classifier, sample)


def saved(workspace):
    pipeline = Pipeline(tiny_model(), dataclasses.replace(tiny_config(), draw=OneStep(), name="s"))
    return [(model_hash(workspace / "student"), pipeline)]


def run_quality(workspace, judge=None, **settings):
    settings = {"iterations": (2,), "samples": 6, **settings}
    return measure(saved(workspace), judge or plain_judge(), Quality(**settings), workspace / "r.json")


# Before the first picture is drawn


@pytest.fixture
def nothing_drawn_later(monkeypatch):
    """A function from whose call on nothing can be drawn."""

    def draws(*_, **__):
        raise AssertionError("drew first")

    return lambda: monkeypatch.setattr(Pipeline, "sample_tokens", draws)


@pytest.fixture
def nothing_drawn(nothing_drawn_later):
    nothing_drawn_later()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (measuring("--out", "pictures"), ("pictures", "folder")),
        (measuring("--out", "teacher/model.safetensors"), ("not a results file",)),
        (measuring("--out", "student/config.json/a.json"), ("a.json",)),
        (measuring("--batch-size", 0), ("--batch-size 0",)),
        (measuring("--repeats", -1, "--batches", 1), ("--repeats -1",)),
        (measuring(samples=3), ("--samples 3", "expected 4")),
        (measuring(samples=1_000_001), ("1,000,000",)),
        (measuring("--iterations", 17), ("--iterations 17", "1 to 16")),
        (measuring("--guidance", 2), ("guidance", "baked in")),
        (measuring(features="plain_features:flat"), ("plain_features:flat", "features)")),
        (measuring("--judge", "fashion-judge"), ("--judge tells t-shirt", "cross, square")),
        (measuring("--reference", "nowhere.npz"), ("nowhere.npz", "openaipublic", "SHA-256 b32732719497")),
        (measuring("--keep-images", "pictures/cross/0.png"), ("0.png",)),
        (measuring("--npz"), ("--keep-images DIR",)),
        (measuring("--rewards", "classifier", "--judge", "j"), ("--judge", "cannot be combined with --rewards")),
        (("evaluate", "student", "impostor"), ("two different models are named student",)),
        (("evaluate", "student", "fashion-student"), ("fashion-student and student draw other classes",)),
        (("compare", "a.json", "b.json"), ("a.json is not there",)),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_drawn(run, nothing_drawn, monkeypatch, arguments, words):
    if "plain_features:flat" not in arguments:  # what is wrong there, only real images show
        monkeypatch.setattr("marval.evaluate.judge.measure_data", None)
    refused(run(*arguments), *words)


def test_a_folder_of_others_is_not_taken_for_images(run, workspace, nothing_drawn):
    folder = workspace / "drawn" / "student-K2-seed0-8"
    folder.mkdir(parents=True)
    (folder / "shard-00000.safetensors").write_text("mine")
    refused(run(*measuring("--keep-images", "drawn")), "holds files but no plan.json", "another --keep-images")
    assert (folder / "shard-00000.safetensors").read_text() == "mine"
    (folder / "plan.json").write_text("{")
    refused(run(*measuring("--keep-images", "drawn")), "plan.json is damaged")


# Rows


def test_results_resume_and_refuse_other_weights(workspace, nothing_drawn_later, capsys):
    rows = run_quality(workspace, iterations=(2, 3, 2), samples=7)
    assert [row["iterations"] for row in rows] == [2, 3]
    assert all(row["gflops_per_image"] > 0 and row["metrics"] == METRICS for row in rows)
    classifier = Classifier("plain", 1, ("cross", "square"))
    judge = dataclasses.replace(plain_judge(classifier), classifier_sha256="c")
    assert "accuracy" in run_quality(workspace, judge, samples=7)[1]  # without all that is asked it is measured again
    nothing_drawn_later()
    capsys.readouterr()
    run_quality(workspace, iterations=(2, 3), samples=7)
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["s K=2, seed 0", "s K=3, seed 0"]
    Pipeline(tiny_model(1), tiny_config()).save(workspace / "student")
    with pytest.raises(ValueError, match="other weights named s"):
        run_quality(workspace)


def test_a_row_of_other_metrics_is_measured_again(workspace):
    (first,) = run_quality(workspace)
    content = json.loads((workspace / "r.json").read_text())
    content["quality"]["rows"][0].update(fd=123.0, metrics=METRICS + 1)
    (workspace / "r.json").write_text(json.dumps(content))
    (again,) = run_quality(workspace)
    assert (again["fd"], again["metrics"]) == (first["fd"], METRICS)


# Nothing that went wrong is hidden


def test_a_judge_that_says_nan_is_no_judge_that_says_something(workspace):
    """Its accuracy would be that of class 0, everywhere."""
    classifier = Classifier("plain", 1, ("cross", "square")).eval()
    next(classifier.parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="log_probability of 6 images is nan"):
        run_quality(workspace, plain_judge(classifier))
    assert "diversity" not in plain_judge().figures(tiny_data().images[:2], torch.tensor([0, 1]))  # it has no pair


def test_training_watches_all_figures_of_the_judge_and_a_held_out_reward(workspace):
    dark = RewardJudge({"dark": lambda images, prompts: 1 - images.mean(dim=(1, 2, 3))}, "{}", tiny_config(), CPU)
    pipeline = saved(workspace)[0][1]
    figures = probe(plain_judge(), 4, 2, held_out=dark)(pipeline)
    images, _ = draw_bytes(pipeline, 4, 2, seed=0)
    assert {"fd", "diversity", "held_out"} == set(figures)
    assert figures["held_out"] == pytest.approx(1 - float(images.float().mean()) / 255)


# Rewards


def test_rewards_are_recorded_with_images_and_prompts_and_not_scored_twice(workspace):
    models, out, calls = saved(workspace), workspace / "rewards.json", []

    def bright(images, prompts):
        calls.append(len(images))
        return images.mean(dim=(1, 2, 3))

    def length(images, prompts):
        return torch.tensor([float(len(prompt)) for prompt in prompts])

    def run(rewards, seeds=(2,)):
        judge = RewardJudge(rewards, "one {}", tiny_config(), CPU)
        return measure(models, judge, Quality((3,), 7, seeds), out)

    run({"bright": bright})
    run({"length": length})
    (row,) = run({"bright": bright, "length": length})
    assert calls == [1, 7]  # a blank one first
    assert (row["samples"], row["prompts"], row["seed"]) == (7, 2, 2)
    assert (row["prompt"], row["iterations"], row["model"]) == ("one {}", 3, "s")
    images, labels = draw_bytes(models[0][1], 7, 3, seed=2)
    expected = (images.float() / 255).mean(dim=(1, 2, 3))
    assert row["rewards"]["bright"]["mean"] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert row["rewards"]["bright"]["standard_error"] == pytest.approx(expected.std().item() / 7**0.5, rel=1e-5)
    names = [len("one " + tiny_config().class_names[label]) for label in labels]
    assert row["rewards"]["length"]["mean"] == pytest.approx(sum(names) / 7, rel=1e-5)
    assert len(run({"bright": bright}, seeds=(2, 3))) == 2


# The verb


def test_two_processes_evaluate_as_one_and_say_what_made_the_row(workspace):
    count, rows = SHARD + 10, []  # each process draws a shard
    for processes in (1, 2):
        done = marval(
            *measuring("--keep-images", f"drawn-{processes}", samples=count),
            "--out", f"{processes}.json", cwd=workspace, processes=processes,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        (row,) = read_results(workspace / f"{processes}.json")["quality"]
        made = row.pop("made")
        assert {"command", "commit", "device", "versions", "processes", "threads"} == set(made)
        assert (made["processes"], made["threads"]) == (processes, 1)
        rows.append(row)
    assert rows[0] == rows[1]
    assert {"fd", "diversity", "own_kid", "own_precision", "own_recall"} <= set(rows[0])
    assert len(rows[0]["sha256"]) == len(rows[0]["data_sha256"]) == 64


def test_every_temperature_has_rows_images_and_a_column_of_its_own(workspace, run):
    code, out, error = run(*measuring("--temperature", 0.5, 1, "--keep-images", "kept"))
    assert code == 0, error
    names = {"student-K2-temperature0.5-seed0-8", "student-K2-seed0-8"}
    assert {folder.name for folder in (workspace / "kept").iterdir()} == names
    cold, own = read_results(workspace / "results/evaluate.json")["quality"]
    assert (cold["draw"]["temperature"], own["draw"]["temperature"]) == (0.5, 1.0)
    assert cold["fd"] != own["fd"]
    assert "temperature" in out


def test_kept_images_serve_rows_that_are_measured_already_and_rewards(workspace, run):
    arguments = measuring("--iterations", 2, 2, samples=6)
    for more in ((), ("--keep-images", "kept", "--npz")):
        code, _, error = run(*arguments, *more)
        assert code == 0, error
        assert len(read_results(workspace / "results/evaluate.json")["quality"]) == 1
    (archive,) = workspace.glob("kept/*/images.npz")
    with np.load(archive) as content:
        assert content["arr_0"].shape == (6, 8, 8, 3)
        assert content["arr_1"].tolist() == [0, 1] * 3
        mean = content["arr_0"].mean() / 255
    scoring = ("evaluate", "student", "--rewards", "plain_features:bright", "--iterations", 2, "--samples", 6)
    code, _, error = run(*scoring, "--keep-images", "kept", "--out", "rewards.json")
    assert code == 0, error
    (row,) = read_results(workspace / "rewards.json")["rewards"]
    reward = row["rewards"]["plain_features:bright"]
    assert reward["mean"] == pytest.approx(mean, rel=1e-4)
    assert reward["sha256"] == hashlib.sha256((workspace / "plain_features.py").read_bytes()).hexdigest()
    assert len(list((workspace / "kept").iterdir())) == 1  # the same images
    with (workspace / "plain_features.py").open("a") as file:
        file.write("# changed")
    assert run(*scoring, "--out", "rewards.json")[0] == 0
    (row,) = read_results(workspace / "rewards.json")["rewards"]
    assert row["rewards"]["plain_features:bright"]["sha256"] != reward["sha256"]  # scored again


def test_teachers_at_several_t_and_w_are_measured_in_quality_and_time(workspace, run):
    code, said, error = run(
        "evaluate", "teacher", "student", "--iterations", 2, 4, "--diffusion-steps", 2, 5, "--samples", 8,
        "--features", FEATURES, "--batches", 1, 2, "--repeats", 1, "--out", "r.json",
    )  # fmt: skip
    assert code == 0, error
    results = read_results(workspace / "r.json")
    for part, count in (("quality", 6), ("timing", 12)):
        assert len(results[part]) == count
        assert {row["draw"].get("diffusion_steps") for row in results[part]} == {5, 2, None}
    assert all(len(row["sha256"]) == 64 and row["decoded"] for row in results["timing"])
    assert "images / s (batch)" in said


@pytest.mark.parametrize(
    "arguments",
    [
        measuring("--repeats", -1, "--batches", 1),  # refused by every process, before they know each other
        measuring("--out", "kept.json"),  # by the first alone: the others wait for it
    ],
    ids=["all", "one"],
)
def test_a_refusal_of_several_processes_is_said_once_and_ends_them_all(workspace, arguments):
    row = quality("student", 2, features="others") | {"sha256": None}
    (workspace / "kept.json").write_text(json.dumps({"quality": {"rows": [row]}}))
    done = marval(*arguments, cwd=workspace, processes=3)
    assert done.returncode != 0
    assert done.stderr.count("marval: ") == 1, done.stderr
