"""The command line, by subprocess: what it makes, and one clear line with exit code 2 for bad input."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from marval.io.checkpoint import save_model
from tiny import tiny_config, tiny_model

MARVAL = [sys.executable, "-m", "marval"]


def marval(*arguments, cwd, prefix=()):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}
    return subprocess.run(
        [*prefix, *MARVAL, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def refused(result, *words):
    """One line on standard error, exit code 2, with these words in it."""
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr
    return True


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with tiny pictures in three classes, and a tiny untrained teacher."""
    root = tmp_path_factory.mktemp("work")
    rng = np.random.default_rng(0)
    for name in ("apple", "pear", "fig"):
        (root / "pictures" / name).mkdir(parents=True)
        for i in range(8):
            array = rng.integers(0, 255, (18, 20, 3), dtype=np.uint8)
            Image.fromarray(array).save(root / "pictures" / name / f"{i}.png")
    save_model(root / "tiny", tiny_model(), tiny_config())
    return root


def test_help_is_quick_and_lists_the_verbs(work):
    marval("--help", cwd=work)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        result = marval("--help", cwd=work)
        times.append(time.perf_counter() - began)
    assert result.returncode == 0
    assert all(verb in result.stdout for verb in ("train", "distill", "tune", "sample", "evaluate", "demo"))
    assert min(times) < 0.5


@pytest.mark.parametrize(
    "verb",
    [
        "train",
        "distill",
        "tune",
        "sample",
        "evaluate",
        "compare",
        "sweep",
        "bench",
        "train-classifier",
        "convert",
        "demo",
    ],
)
def test_each_verb_shows_two_commands(verb, work):
    result = marval(verb, "--help", cwd=work)
    assert result.returncode == 0
    assert result.stdout.count(f"\nmarval {verb}") == 2


def test_sample_writes_pictures_and_a_grid(work):
    arguments = ["tiny", "--classes", "square,cross", "--count", 5, "--iterations", 3, "--seed", 7]
    for out in ("first", "second"):
        result = marval("sample", *arguments, "--out", out, cwd=work)
        assert result.returncode == 0, result.stderr
    names = sorted(path.name for path in (work / "first").iterdir())
    expected = ["square-7", "cross-8", "square-9", "cross-10", "square-11"]
    assert names == [*(f"{i:05d}-{name}.png" for i, name in enumerate(expected)), "grid.png"]
    assert Image.open(work / "first" / names[0]).size == (8, 8)
    for name in names:
        assert (work / "first" / name).read_bytes() == (work / "second" / name).read_bytes()


def test_own_images_train_then_distill_then_tune(work):
    """The README's three commands, on 24 pictures of 18x20 pixels."""
    settings = ["--batch-size", 4, "--no-autocast", "--out"]
    result = marval("train", "--data", "folder:pictures", "--updates", 3, "--decay", 1, *settings, "mine", cwd=work)
    assert result.returncode == 0, result.stderr
    config = json.loads((work / "mine/model/config.json").read_text())
    assert config["class_names"] == ["apple", "fig", "pear"]
    assert config["space"]["image_size"] == [16, 20]
    assert config["space"]["channels"] == 3

    distilling = ["--updates", 3, "--warmup", 1, "--probe-samples", 0, "--iterations", 2]
    result = marval("distill", "mine", *distilling, *settings, "student", cwd=work)
    assert result.returncode == 0, result.stderr
    for name, architecture in (("reward", "plain"), ("judge", "residual")):
        result = marval(
            "train-classifier", "--data", "folder:pictures", "--architecture", architecture, "--epochs", 1,
            "--out", f"{name}.safetensors", cwd=work,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
    result = marval(
        "tune", "student", "--reward", "classifier", "--classifier", "reward.safetensors",
        "--judge", "judge.safetensors", "--updates", 2, "--iterations", 2, "--gradient-iterations", 2,
        "--batch-size", 3, "--probe-samples", 9, "--out", "tuned", cwd=work,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    result = marval(
        "evaluate", "student", "tuned", "--judge", "judge.safetensors", "--samples", 9, "--iterations", 2,
        "--batches", 1, "--repeats", 1, "--out", "figures.json", cwd=work,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = json.loads((work / "figures.json").read_text())["quality"]["rows"]
    assert [row["model"] for row in rows] == ["student", "tuned"]
    assert all(row["fd"] > 0 and 0 <= row["accuracy"] <= 1 and row["gflops_per_image"] > 0 for row in rows)
    assert "FD-EfficientNet" in result.stdout


def test_bad_names_and_numbers(work):
    assert refused(marval("sampel", "tiny", cwd=work), "sampel", "did you mean sample")
    assert refused(marval("sample", "fashion-studnt", cwd=work), "fashion-studnt")
    assert refused(marval("distill", "imagenet256-base", cwd=work), "a recipe, not a model")
    assert refused(marval("sample", "tiny", "--classes", "sqare", cwd=work), "sqare", "square")
    assert refused(marval("sample", "tiny", "--classes", "2", cwd=work), "'2'", "0 to 1")
    assert refused(marval("sample", "tiny", "--iterations", 17, cwd=work), "17", "1 to 16")
    assert refused(marval("sample", "tiny", "--iterations", 0, cwd=work), "0 iterations", "1 to 16")
    assert refused(marval("sample", "tiny", "--diffusion-steps", 1, cwd=work), "1 diffusion steps", "2 to 1000")
    assert refused(marval("sample", "tiny", "--device", "nonsense", cwd=work), "nonsense")
    assert refused(marval("distill", "tiny", "--objective", "sim", "--data", "nowhere", cwd=work), "nowhere")
    assert not (work / "samples").exists()
    assert not (work / "runs").exists()


def test_missing_or_unfit_data(work, tmp_path):
    assert refused(marval("train", "--data", "folder:nothing", cwd=work), "nothing", "sub-folder")
    assert refused(marval("train", "--data", "fashion-mnist:nothing", cwd=work), "nothing", ".gz")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "broken.png").write_bytes(b"not a picture")
    assert refused(marval("train", "--data", f"folder:{tmp_path}", cwd=work), "broken.png", "mend or remove")
    assert refused(marval("distill", "tiny", "--data", "folder:pictures", cwd=work), "classes", "apple")
    assert refused(marval("evaluate", "tiny", "--data", "folder:pictures", cwd=work), "classes", "apple")


def test_damaged_and_foreign_checkpoints(work, tmp_path):
    whole = (work / "tiny/model.safetensors").read_bytes()
    for name, content in (("truncated", whole[: len(whole) // 2]), ("text", b"hello"), ("empty", b"")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
        assert refused(marval("sample", tmp_path / name, cwd=work), name, "damaged")
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "foreign.safetensors")
    assert refused(marval("sample", tmp_path / "foreign.safetensors", cwd=work), "not a marval model")
    (tmp_path / "nothing").mkdir()
    assert refused(marval("sample", tmp_path / "nothing", cwd=work), "does not exist")


def test_a_full_disk_leaves_nothing_half_written_and_the_last_good_state(work, tmp_path):
    """A limit on file size stands in for the disk: first nothing fits under it, then the model but not the state."""
    out = tmp_path / "run"

    def train(iterations, kilobytes, *flags):
        settings = ["--data", "folder:pictures", "--batch-size", 4, "--no-autocast", "--out", out]
        limited = ("bash", "-c", f'ulimit -f {kilobytes}; exec "$@"', "bash")
        return marval("train", *settings, "--updates", iterations, *flags, cwd=work, prefix=limited)

    def files():
        return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())

    assert refused(train(2, 64), "model.safetensors", "space")
    assert files() == ["log.jsonl"]
    assert train(2, "unlimited").returncode == 0
    good = files()
    assert refused(train(4, 20_000, "--resume"), "state-00000004", "space", "--resume")
    assert files() == good
    assert train(4, "unlimited", "--resume").returncode == 0
    assert [line.name for line in out.glob("state-*")] == ["state-00000004"]


def test_training_that_diverges_says_so(work, tmp_path):
    result = marval(
        "train", "--data", "folder:pictures", "--updates", 30, "--warmup", 1, "--batch-size", 4,
        "--learning-rate", 1e30, "--no-autocast", "--out", tmp_path / "run", cwd=work,
    )  # fmt: skip
    assert refused(result, "not finite", "loss nan", "lower the learning rate")
    assert not list(tmp_path.glob("run/state-*"))


def test_an_official_checkpoint_comes_and_goes(work, tmp_path):
    import torch

    from marval.config import MARConfig
    from marval.model import MAR
    from marval.runtime.rng import generator

    sizes = MARConfig((4, 4), 16, 3, 16, 1, 2, 16, 1, 2, 16, 1, buffer_size=2)
    tensors = MAR(sizes).initialize(generator(0)).state_dict()
    torch.save({"model": tensors, "model_ema": tensors}, tmp_path / "a.pth")
    assert refused(marval("convert", "mar", tmp_path / "a.pth", tmp_path / "model", cwd=work), "a.pth", "--heads")
    assert not (tmp_path / "model").exists()
    result = marval("convert", "mar", tmp_path / "a.pth", tmp_path / "model", "--heads", 2, cwd=work)
    assert result.returncode == 0, result.stderr
    result = marval("convert", "to-mar", tmp_path / "model", tmp_path / "b.pth", cwd=work)
    assert result.returncode == 0, result.stderr
    again = torch.load(tmp_path / "b.pth", weights_only=True)["model_ema"]
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_bad_rewards(work):
    def tune(reward):
        return marval("tune", "fashion-student", "--reward", reward, "--out", "never", cwd=work)

    assert refused(tune("pixscore"), "pixscore", "pickscore", "file.py:function")
    assert refused(tune("clip:nowhere"), "clip:nowhere", "config.json", "put them")
    assert not (work / "never/model").exists()
