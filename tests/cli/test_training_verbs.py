"""The verbs that train: what they refuse before anything is read, what they say, and runs as a user types them."""

import dataclasses
import errno
import json
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import save_file

import marval.evaluate.judge  # noqa: F401  # before a test takes away what it reads with
from marval.config import LatentSpace, MARConfig, OneStep
from marval.model import MAR
from marval.pipeline import Pipeline, load
from marval.runtime.rng import generator
from pictures import make_pictures
from processes import environment, python
from tiny import tiny_config, tiny_model
from training import log_of

REWARDS = """
def score(images, prompts):
    return images.mean(dim=(1, 2, 3))
def dark(images, prompts):
    return -score(images, prompts)
"""


@pytest.fixture
def nothing_is_read(monkeypatch):
    def never(*_, **__):
        raise AssertionError("something was read")

    for name in ("marval.rewards.parse_rewards", "marval.data.load_data", "marval.data.load_images"):
        monkeypatch.setattr(name, never)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--learning-rate", "0"], ("--learning-rate 0", "above 0")),
        (["train", "--updates", "50", "--warmup", "51"], ("--warmup 51", "50 updates")),
        (["train", "--name", "a/b"], ("--name 'a/b'", "plain name")),
        (["train", "classifier", "--epochs", "0"], ("--epochs 0",)),
        (["distill", "fashion-teacher", "--updates", "50"], ("--updates 50", "100")),
        (["tune", "fashion-student", "--probe-samples", "0"], ("--probe-samples 0",)),
        (["tune", "fashion-student", "--gradient-iterations", "9"], ("--gradient-iterations 9", "8")),
        (["tune", "fashion-student", "--prompt", "{x}"], ("--prompt '{x}'", "exactly one {}")),
        (["distill", "fashion-student"], ("one-step student already",)),
        (["distill", "fashion-teacher", "--guidance-range", "1", "2"], ("guidance 3", "from 1 to 2")),
        (["tune", "fashion-teacher"], ("is a teacher",)),
        (["tune", "fashion-student", "--anchor", "1"], ("--anchor and --teacher",)),
        (["tune", "fashion-student", "--teacher", "fashion-teacher"], ("--anchor and --teacher",)),
        (["tune", "fashion-student", "--reward", "fd:pixels", "--updates", "20"], ("--updates 20", "moments-warmup")),
    ],
)
def test_bad_settings_are_refused_before_anything_is_read(arguments, words, refusal, nothing_is_read):
    said = refusal(*arguments)
    assert all(word in said for word in words), said


def test_outputs_are_checked_before_anything_is_read(tmp_path, refusal, nothing_is_read):
    (tmp_path / "file").write_text("")
    (tmp_path / "run" / "state-00000002").mkdir(parents=True)
    (tmp_path / "run" / "state-00000002" / "run.json").write_text("{}")
    for verb in (["train"], ["distill", "fashion-teacher"], ["tune", "fashion-student"]):
        assert "is a file" in refusal(*verb, "--out", "file")
        assert "Not a directory" in refusal(*verb, "--out", "file/inside")
        assert "--resume" in refusal(*verb, "--out", "run")
        assert "nothing to resume" in refusal(*verb, "--out", "nowhere", "--resume")
    for out in (tmp_path, "file/inside"):
        refusal("train", "classifier", "--out", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]


def test_a_cached_student_is_distilled_resumed_and_draws_at_any_k(marval, refusal, tmp_path):
    make_pictures(tmp_path / "pictures", tiny_config().class_names, 6, grey=True)
    Pipeline(tiny_model(), dataclasses.replace(tiny_config(), data="folder:pictures")).save(tmp_path / "teacher")
    how = [
        "distill",
        "teacher",
        "--warmup",
        2,
        "--batch-size",
        4,
        "--iterations",
        4,
        "--log-every",
        1,
        "--probe-samples",
        4,
    ]
    marval(*how, "--cached", "--updates", 3, "--out", "run")
    assert "mar.cached" in refusal(*how, "--updates", 5, "--out", "run", "--resume")
    marval(*how, "--cached", "--updates", 5, "--out", "run", "--resume")
    assert [line["update"] for line in log_of(tmp_path / "run")] == [1, 2, 3, 4, 5]
    student = load(tmp_path / "run")
    for iterations in (1, 4, 16):
        together = student.sample(["cross", "square"], seed=3, iterations=iterations)
        torch.testing.assert_close(student.sample(["square"], seed=4, iterations=iterations), together[1:])


def test_tuning_starts_where_there_are_as_many_classes_as_probe_images(marval, tmp_path):
    make_pictures(tmp_path / "pictures", tiny_config().class_names, 3, grey=True)
    student = dataclasses.replace(tiny_config(), draw=OneStep(), data="folder:pictures")
    Pipeline(tiny_model(), student).save(tmp_path / "student")
    (tmp_path / "mine.py").write_text(REWARDS)
    fast = ["--updates", 1, "--probe-every", 1, "--batch-size", 4, "--iterations", 2, "--probe-samples", 2]
    said = marval("tune", "student", *fast, "--reward", "mine.py:score", "--out", "run").out
    assert "no --judge and no --held-out" in said
    assert "1 of 1 updates done" in said
    log = log_of(tmp_path / "run")
    assert [line["update"] for line in log] == [0, 1]
    assert all("fd" in line and "diversity" not in line for line in log)  # no class has two images


def test_a_distance_is_judged_in_features_that_it_is_not_tuned_on(marval, refusal, tmp_path):
    make_pictures(tmp_path / "pictures", tiny_config().class_names, 6, grey=True)
    student = dataclasses.replace(tiny_config(), draw=OneStep(), data="folder:pictures")
    Pipeline(tiny_model(), student).save(tmp_path / "student")
    (tmp_path / "mine.py").write_text(REWARDS)
    fast = ["--updates", 3, "--probe-every", 1, "--batch-size", 4, "--iterations", 2, "--probe-samples", 4]
    fast += ["--moments-warmup", 1, "--log-every", 1]
    said = marval("tune", "student", *fast, "--reward", "fd:efficientnet=1,mine.py:score=0.1", "--out", "run").out
    assert "the held-out Fréchet distance and diversity are on pixels" in said
    log = log_of(tmp_path / "run")
    assert all(line["fd:efficientnet"] > 0 for line in log[1:])
    assert log[-1]["fd"] > 0
    said = marval("tune", "student", *fast, "--reward", "fd:pixels", "--out", "pixels").out
    assert "which is not tuned on" not in said  # it is EfficientNet, as always
    for reward, words in {
        "fd:nothing": "reward fd 'nothing': expected efficientnet, classifier:FILE, pixels, file.py:function",
        "fd:classifier:no.file": "no.file does not exist",
        "fd:efficientnet,fd:pixels": "no features are left to judge on",
    }.items():
        said = refusal("tune", "student", *fast, "--reward", reward, "--out", "never")
        assert words in said
    missing = ["--reward", "fd", "--data", "folder:nowhere", "--out", "never"]
    assert "nowhere" in refusal("tune", "student", *fast, *missing)
    assert not (tmp_path / "never").exists()


def test_a_latent_student_is_distilled_and_tuned_with_the_full_size_recipe(marval, refusal, tmp_path):
    """Latents for the anchor, pictures for the judge, 30 classes, no classifier, a reward that is only watched."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 4), norm_num_groups=2, layers_per_block=1, latent_channels=2, sample_size=16,
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    classes = [f"class-{i:02d}" for i in range(30)]
    make_pictures(tmp_path / "pictures", classes, 2, (20, 20))
    marval("cache", "cache", "--images", "pictures", "--vae", "vae", "--image-size", 16, "--scale", 0.2325)
    space = LatentSpace((16, 16), str(tmp_path / "vae"), vae_stride=4, latent_channels=2)
    mar = MARConfig(space.token_grid, 2, 30, 16, 1, 2, 16, 2, 2, 16, 2, buffer_size=2)
    draw = dataclasses.replace(tiny_config().draw, guidance=3.0, clip=False)
    named = {"class_names": tuple(classes), "data": "latents:cache", "name": "teacher"}
    config = dataclasses.replace(tiny_config(), mar=mar, space=space, draw=draw, **named)
    Pipeline(MAR(mar).initialize(generator(0)).eval(), config).save(tmp_path / "teacher")
    (tmp_path / "mine.py").write_text(REWARDS)

    recipe = ["--preset", "imagenet256-base", "--data", "latents:cache", "--batch-size", 4, "--log-every", 1]
    recipe += ["--iterations", 4, "--probe-samples", 60, "--probe-every", 3, "--updates", 3]
    assert "--judge-data folder:DIR" in refusal("distill", "teacher", *recipe, "--warmup", 1)
    marval("distill", "teacher", *recipe, "--warmup", 1, "--judge-data", "folder:pictures", "--out", "student")
    draw = load(tmp_path / "student").config.draw
    assert (draw.guidance, draw.guidance_schedule) == (1.2, "constant")  # the preset's, not the teacher's 3
    assert log_of(tmp_path / "student")[-1]["fd"] > 0

    tuning = [*recipe, "--reward", "mine.py:score", "--gradient-iterations", 2, "--anchor-warmup", 1, "--anchor", 0.5]
    pictures = ["--judge-data", "folder:pictures"]
    assert "--judge-data folder:DIR" in refusal("tune", "student", *tuning, "--teacher", "teacher", "--out", "tuned")
    assert "--anchor and --teacher: expected both" in refusal("tune", "student", *tuning, *pictures, "--out", "tuned")
    watched = ["--held-out", "mine.py:dark", "--out", "tuned"]
    assert "no --judge" not in marval("tune", "student", *tuning, *pictures, *watched, "--teacher", "teacher").out
    log = log_of(tmp_path / "tuned")
    assert {"fd", "diversity", "held_out"} <= set(log[0]) & set(log[-1])
    assert not {"accuracy", "log_probability"} & set(log[-1])
    assert {"l1", "l2", "auxiliary_loss", "reward", "gradient_norm"} <= set(log[-1])
    assert log[0]["held_out"] == pytest.approx(-log[2]["reward"], abs=0.1)
    assert load(tmp_path / "tuned").config.draw == draw
    Pipeline(tiny_model(), tiny_config()).save(tmp_path / "other")
    said = refusal("tune", "student", *tuning, *pictures, "--teacher", "other", "--out", "never")
    assert "other sizes, tokens or classes" in said


def test_a_full_disk_ends_a_run_in_one_line_and_the_last_state_goes_on(marval, refusal, tmp_path, monkeypatch):
    make_pictures(tmp_path / "pictures", ("a", "b"), 8)
    run = ["train", "--data", "folder:pictures", "--batch-size", 4, "--updates", 5, "--save-every", 2, "--out", "run"]

    def full(tensors, file, metadata):
        if "state-00000004" in str(file):
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, file, metadata)

    with monkeypatch.context() as later:
        later.setattr("marval.io.files.save_file", full)
        said = refusal(*run)
    assert "state-00000004 was not saved" in said
    assert "No space left on device" in said
    assert [path.name for path in sorted(tmp_path.glob("run/*state-*"))] == ["state-00000002"]
    assert "5 of 5 updates done" in marval(*run, "--resume").out
    assert [line["update"] for line in log_of(tmp_path / "run")] == [2, 4, 5]


def test_ctrl_c_saves_says_how_to_go_on_and_exits_with_130(tmp_path):
    make_pictures(tmp_path / "pictures", ("a", "b"), 8)
    out = tmp_path / "run"
    arguments = ["train", "--data", f"folder:{tmp_path / 'pictures'}", "--batch-size", 4, "--no-autocast", "--out", out]
    process = subprocess.Popen(
        python(1, "-m", "marval", *arguments, "--updates", 100_000, "--log-every", 1),
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (out / "log.jsonl").is_file() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    (state,) = out.glob("state-*")
    update = json.loads((state / "run.json").read_text())["update"]
    assert log_of(out)[-1]["update"] == update >= 1
    assert f"{update} of 100000 updates done" in said
    assert errors == "marval: interrupted: what it did is saved, go on with --resume\n"
    assert process.returncode == 130
    again = python(1, "-m", "marval", *arguments, "--updates", update + 1, "--resume")
    assert subprocess.run(again, env=environment(), timeout=60).returncode == 0
