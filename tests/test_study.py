"""Rewards over class-name prompts, and the study of reward tuning, on tiny models."""

import json

import pytest
import torch

from marval.config import OneStep
from marval.evaluate.images import draw_bytes
from marval.evaluate.rewards import evaluate_rewards
from marval.evidence.documents import fill_markdown
from marval.study import cheapest_run, kept_of, price, rl_grid
from processes import marval as processes_marval
from test_cli import marval, refused
from test_evaluate import tiny_pipeline


def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))


def length(images, prompts):
    return torch.tensor([float(len(prompt)) for prompt in prompts])


def test_rewards_are_recorded_with_images_prompts_and_seeds_and_not_scored_twice(tmp_path):
    pipeline, folder, out = tiny_pipeline(OneStep()), tmp_path / "model", tmp_path / "rewards.json"
    pipeline.save(folder)
    calls: list[int] = []

    def counted(images, prompts):
        calls.append(len(images))
        return brightness(images, prompts)

    run = {"prompt": "one {}", "iterations": (3,), "samples": 7, "out": out, "seeds": (2,), "report": lambda line: None}
    evaluate_rewards([(folder, pipeline)], {"bright": counted}, **run)
    evaluate_rewards([(folder, pipeline)], {"bright": counted, "length": length}, **run)
    assert calls == [7]
    results = json.loads(out.read_text())["rewards"]
    (row,) = results["rows"]
    assert (row["samples"], row["prompts"], row["seeds"], row["first_seed"]) == (7, 2, 7, 2_000_000)
    assert (row["prompt"], row["iterations"], row["model"]) == ("one {}", 3, "tiny")
    assert {"command", "commit", "torch", "seed"} <= set(results)
    images, labels = draw_bytes(pipeline, 7, 3, seed=2)
    expected = (images.float() / 255).mean(dim=(1, 2, 3))
    assert row["rewards"]["bright"]["mean"] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert row["rewards"]["bright"]["standard_error"] == pytest.approx(expected.std().item() / 7**0.5, rel=1e-2)
    names = [len("one " + pipeline.config.class_names[label]) for label in labels]
    assert row["rewards"]["length"]["mean"] == pytest.approx(sum(names) / 7, rel=1e-5)

    (tmp_path / "page.md").write_text("<!-- rewards: rewards.json -->\n<!-- end -->\n")
    assert fill_markdown(tmp_path / "page.md", tmp_path)
    assert "| tiny | 3 | 7 | 2 | 7 |" in (tmp_path / "page.md").read_text()

    again = evaluate_rewards([(folder, pipeline)], {"bright": brightness}, **{**run, "seeds": (2, 3)})
    assert len(again) == 2
    assert fill_markdown(tmp_path / "page.md", tmp_path)  # one line for both: 14 images of 14 seeds
    (line,) = [line for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith("| tiny")]
    mean, error = line.split("|")[6].split("±")
    parts = [row["rewards"]["bright"] for row in again]
    assert float(mean) == pytest.approx(sum(part["mean"] for part in parts) / 2, abs=1e-4)
    assert float(error) == pytest.approx(sum(part["standard_error"] ** 2 for part in parts) ** 0.5 / 2, abs=1e-4)
    assert "| tiny | 3 | 14 | 2 | 14 |" in line

    with pytest.raises(ValueError, match="where the class"):
        evaluate_rewards([(folder, pipeline)], {"bright": brightness}, **{**run, "prompt": "one"})
    tiny_pipeline(OneStep(), seed=1).save(folder)
    with pytest.raises(ValueError, match="other weights"):
        evaluate_rewards([(folder, pipeline)], {"bright": brightness}, **run)


def test_early_stopping_is_read_off_a_whole_curve():
    from marval.config import FinetuneConfig

    def row(fd, diversity, held_out):
        return {"fd": float(fd), "diversity": float(diversity), "log_probability": held_out}

    good = [row(10, 5, -0.3), row(10.2, 5, -0.2), row(10.5, 4.9, -0.1), row(10.8, 4.9, -0.15)]
    assert kept_of(good, FinetuneConfig()) == (2, "")
    kept, stopped = kept_of([*good, row(12, 4.9, -0.01)], FinetuneConfig())
    assert kept == 2  # the higher reward was bought with distance
    assert "Fréchet" in stopped


def test_runs_are_compared_where_they_gained_the_same():
    def run(*points):
        return {"curve": [{"log_probability": lp, "fd": fd, "diversity": d} for lp, fd, d in points]}

    fast = run((-0.10, 100.0, 50.0), (-0.06, 120.0, 40.0))  # half of its way is a fifth
    slow = run((-0.10, 100.0, 50.0), (-0.08, 105.0, 48.0), (-0.07, 130.0, 40.0))
    assert price(fast) == pytest.approx((1.10, 0.9))
    assert price(slow) == pytest.approx((1.05, 0.96))
    assert price(run((-0.10, 100.0, 50.0), (-0.09, 99.0, 50.0))) is None
    assert cheapest_run([fast, slow]) is slow
    assert cheapest_run([]) is None


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny teacher on Fashion-MNIST's pixels, and its student."""
    import dataclasses

    from marval.config import Chain, MARConfig, ModelConfig, PixelSpace
    from marval.data import FASHION_CLASSES
    from marval.model import MAR
    from marval.pipeline import Pipeline
    from marval.randomness import generator

    root = tmp_path_factory.mktemp("study")
    space = PixelSpace((28, 28), 1, 7, shift=0.3, scale=3.0)
    mar = MARConfig(
        space.token_grid, space.token_dim, 10, 16, 1, 2, 16, 1, 2, 16, 1, buffer_size=2, learn_variance=False
    )
    model = MAR(mar).initialize(generator(0, "tiny")).eval()
    for parameter in model.head.final_layer.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator("head"))
    config = ModelConfig(mar, space, Chain(1.5, steps=8, clip=True), FASHION_CLASSES, 2, "tiny", "fashion-mnist")
    Pipeline(model, config).save(root / "teacher")
    Pipeline(model, dataclasses.replace(config, draw=OneStep(clip=True), name="student")).save(root / "student")
    return root


SMALL = ["--iterations", 4, "--probe-every", 2, "--sample-iterations", 2, "--backprop-iterations", 2, "--batch-size", 4,
         "--anchor-warmup", 1, "--learning-rate", 1e-3]  # fmt: skip


def test_the_study_runs_its_grid_and_writes_results_plot_pictures_and_page(work, fashion_train):
    options = [
        "study",
        "rl",
        "student",
        "--teacher",
        "teacher",
        "--samples",
        20,
        "--held-out",
        "test_study_reward:dark",
    ]
    (work / "test_study_reward.py").write_text("def dark(images, prompts):\n    return -images.mean(dim=(1, 2, 3))\n")
    chosen = ["plain", "M=1", "head", "low-rank", "hinge", "anchor: student"]
    options += ["--only", ",".join(chosen)]
    result = marval(*options, *SMALL, cwd=work)
    assert result.returncode == 0, result.stderr
    rows = json.loads((work / "results/study-rl.json").read_text())["study"]["rows"]
    assert [row["run"] for row in rows] == chosen
    for row in rows:
        assert [figures["step"] for figures in row["curve"]][-1] == 4
        for figures in row["curve"]:
            assert {"fd", "diversity", "log_probability", "tuned reward", "test_study_reward:dark"} <= set(figures)
        assert row["curve"][0] == {**rows[0]["curve"][0], "step": 0}  # all start from the same student
        assert row["curve"][-1]["tuned reward"] != row["curve"][0]["tuned reward"]
    by_name = {row["run"]: row for row in rows}
    assert by_name["head"]["settings"]["train"] == "head"
    assert by_name["anchor: student"]["settings"]["anchor_to"] == "student"
    page = (work / "docs/study-rl.md").read_text()
    assert all(f"| {row['run']} | {row['why']} |" in page for row in rows)
    assert f"{rows[0]['curve'][-1]['tuned reward']:.4f}" in page
    furthest = max(rows, key=lambda row: row["curve"][-1]["fd"])
    assert f"furthest from the student is `{furthest['run']}`" in page
    shown = work / f"runs/study-rl/{furthest['run'].replace(': ', '-').replace('=', '-')}/pictures.png"
    assert (work / "docs/study-rl-pictures.png").read_bytes() == shown.read_bytes()
    for name in ("study-rl.png", "study-rl-pictures.png"):
        assert (work / "docs" / name).read_bytes().startswith(b"\x89PNG")

    before = (work / "results/study-rl.json").read_bytes()
    result = marval(*options, *SMALL, cwd=work)  # nothing is run again
    assert result.returncode == 0, result.stderr
    assert (work / "results/study-rl.json").read_bytes() == before
    assert "step" not in result.stdout
    assert refused(marval(*options[:-1], "nothing", *SMALL, cwd=work), "nothing", "plain", "low-rank")


def test_the_grid_changes_one_thing_at_a_time():
    from marval.config import FinetuneConfig

    base = FinetuneConfig()
    runs = {run.name: run.changes for run in rl_grid(base)}
    assert len(runs) == 13
    plain = {"anchor": 0.0, "backprop_iterations": 8}
    assert runs["plain"] == plain
    assert runs["M=4"] == {**plain, "backprop_iterations": 4}
    assert runs["faster"] == {**plain, "learning_rate": 4 * base.learning_rate}
    assert (
        runs["anchor: teacher"]["iterations"] == base.iterations + base.anchor_warmup
    )  # as many updates as the others
    assert len(rl_grid(FinetuneConfig(sample_iterations=2))) == 12


def test_evaluate_measures_rewards_by_name_and_two_processes_find_what_one_does(work):
    result = marval("evaluate", "student", "--rewards", "classifier,math:f", "--samples", 11, cwd=work)
    assert refused(result, "math has no function f")
    (work / "counted.py").write_text(
        "def dark(images, prompts):\n"
        "    with open('scored', 'a') as file:\n"
        "        file.write(len(images) * '.')\n"
        "    return -images.mean(dim=(1, 2, 3))\n"
    )
    found = []
    for processes in (1, 2):
        result = processes_marval(
            "evaluate", "student", "teacher", "--rewards", "classifier,counted:dark", "--samples", 11, "--seed", 0, 1,
            "--out", f"rewards-{processes}.json", cwd=work, processes=processes,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert (work / "scored").read_text() == "." * 11 * 4  # each image once: two models, two seeds
        (work / "scored").unlink()
        assert result.stdout.count("tiny K=2, T=8, w=1.5, seed 1: classifier -") == 1  # one process speaks
        found.append(json.loads((work / f"rewards-{processes}.json").read_text())["rewards"]["rows"])
        assert all(row.pop("made")["processes"] == processes for row in found[-1])
    assert found[0] == found[1]
    assert [(row["model"], row["seed"], row["samples"], row["prompts"]) for row in found[0]] == [
        ("student", 0, 11, 10), ("student", 1, 11, 10), ("tiny", 0, 11, 10), ("tiny", 1, 11, 10),
    ]  # fmt: skip
    assert all(row["rewards"]["classifier"]["mean"] < 0 for row in found[0])
