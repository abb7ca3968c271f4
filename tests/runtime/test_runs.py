"""Runs: settings are checked where they are made, a folder has one run of one origin, and Ctrl-C loses nothing."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from typing import get_args, get_type_hints

import pytest
import torch
from safetensors.torch import load_file

from marval import cli
from marval.config import Chain, LatentSpace, MARConfig, ModelConfig, OneStep, PixelSpace
from marval.io.checkpoint import load_model, save_model
from marval.io.files import check_output, locked
from marval.model import MAR
from marval.pipeline import load
from marval.presets import DistillConfig, TrainConfig, TuneConfig
from marval.rewards import WeightedReward
from marval.runtime.distributed import start_workers
from marval.runtime.folder import open_run
from marval.runtime.rng import generator
from marval.train import distill as distill_module
from marval.train import teacher as teacher_module
from marval.train import tune as tuning
from processes import command, environment, python
from tiny import tiny_config, tiny_data, tiny_model

TRAIN = TrainConfig(
    updates=4, batch_size=4, tokens_per_image=6, warmup=1, decay=2, save_every=2, log_every=1, autocast=False
)
DISTILL = DistillConfig(
    updates=4, batch_size=4, tokens_per_image=6, warmup=1, save_every=2, log_every=1, autocast=False, guidance=1.5,
    guidance_schedule="linear",
)  # fmt: skip
FINETUNE = TuneConfig(
    updates=4, iterations=4, batch_size=4, learning_rate=1e-3, save_every=2, log_every=1, probe_every=50
)
VERBS = {"train": TrainConfig, "distill": DistillConfig, "tune": TuneConfig}
ZERO_IS_FINE = {
    "seed", "warmup", "decay", "anchor_warmup", "timestep", "guidance", "anchor", "weight_decay", "label_drop",
    "mask_ratio_min", "ema_decay", "hinge", "min_diversity_ratio",
}  # fmt: skip


def numeric(settings, kind):
    """The names of the dataclass's fields that are numbers of this kind."""
    hints = get_type_hints(settings)
    return [name for name, hint in hints.items() if kind in (hint, *get_args(hint))]


FLAGS = [(verb, name) for verb, kind in VERBS.items() for name in [*numeric(kind, int), *numeric(kind, float)]]


def bad_values(settings, name):
    """Values that no setting of this name may have."""
    found = [] if name in ZERO_IS_FINE else [0]
    found += [] if name in ("seed", "hinge") else [-1]
    if name in numeric(settings, float):
        found = [float(x) for x in found] + ([math.nan] if name == "max_distance_ratio" else [math.nan, math.inf])
    return found


def run_train(out, *, resume=False, settings=TRAIN, data=None, **options):
    data = tiny_data() if data is None else data
    with open_run(out, resume=resume) as run:
        return teacher_module.train_teacher(tiny_config(), settings, data, run, **options)


def run_distill(out, *, resume=False, settings=DISTILL, data=None, teacher=0):
    data = tiny_data() if data is None else data
    with open_run(out, resume=resume) as run:
        return distill_module.distill(tiny_model(teacher), tiny_config(), settings, data, run)


def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))


def darkness(images, prompts):
    return -images.mean(dim=(1, 2, 3))


def steady_probe(pipeline):
    return {"fd": 1.0, "diversity": 1.0, "log_probability": -1.0}


def run_tune(out, *, resume=False, settings=FINETUNE, reward=brightness, student=0, anchor=None):
    config = dataclasses.replace(tiny_config(), draw=OneStep())
    with open_run(out, resume=resume) as run:
        return tuning.tune(tiny_model(student), config, reward, settings, run, probe=steady_probe, anchor=anchor)


def other_data():
    """Images of which one pixel differs."""
    data = tiny_data()
    data.images[5, 0, 0, 0] += 1
    return data


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def marval(capsys, monkeypatch, *arguments):
    """Exit code and what stands on standard error, of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["marval", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().err


# Settings


@pytest.mark.parametrize(("verb", "name"), FLAGS)
def test_every_numeric_setting_refuses_values_out_of_its_range(verb, name):
    for value in bad_values(VERBS[verb], name):
        with pytest.raises(ValueError, match=rf"^{name} {value}: expected "):
            VERBS[verb](**{name: value})


@pytest.mark.parametrize(("verb", "name"), [flag for flag in FLAGS if flag[1] != "seed"])
def test_every_numeric_flag_is_refused_in_one_line(verb, name, capsys, monkeypatch):
    value = bad_values(VERBS[verb], name)[0]
    model = {"train": [], "distill": ["fashion-teacher"], "tune": ["fashion-student"]}[verb]
    flag = f"--{name.replace('_', '-')}"
    code, told = marval(capsys, monkeypatch, verb, *model, f"{flag}={value}")
    assert code == 2
    assert told.startswith(f"marval: {flag} {value}: expected ")
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["distill", "fashion-teacher", "--updates", "50"], ("--updates 50", "100")),
        (["train", "--updates", "50", "--warmup", "51"], ("--warmup 51", "50 updates")),
        (["distill", "fashion-teacher", "--probe-samples", "1"], ("--probe-samples 1",)),
        (["tune", "fashion-student", "--probe-samples", "0"], ("--probe-samples 0",)),
        (["tune", "fashion-student", "--gradient-iterations", "9"], ("--gradient-iterations 9", "8")),
        (["tune", "fashion-student", "--prompt", "{x}"], ("--prompt '{x}'", "exactly one {}")),
        (["tune", "fashion-student", "--name", "../elsewhere"], ("--name '../elsewhere'", "plain name")),
        (["train", "--name", "a/b"], ("--name 'a/b'", "plain name")),
        (["train", "classifier", "--epochs", "0"], ("--epochs 0",)),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line_before_anything_is_read(
    arguments, words, capsys, monkeypatch
):
    def never(*_, **__):
        raise AssertionError("something was read")

    for name in ("load_pipeline", "data_of"):
        monkeypatch.setattr(f"marval.cli.training.{name}", never)
    monkeypatch.setattr("marval.data.load_data", never)
    monkeypatch.setattr("marval.data.load_images", never)
    code, told = marval(capsys, monkeypatch, *arguments)
    assert code == 2
    assert told.count("\n") == 1
    assert all(word in told for word in words), told


def test_a_usage_error_still_names_its_argument_and_help_is_help(capsys, monkeypatch):
    code, told = marval(capsys, monkeypatch, "train", "--updates", "abc")
    assert code == 2
    assert "--updates" in told
    monkeypatch.setattr(sys, "argv", ["marval", "distill", "--help"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "warm-up" in text or "warmup" in text
    assert "may differ" in text


def test_short_runs_have_a_short_warm_up_and_presets_are_sound():
    assert [TrainConfig(updates=n).warmup_updates for n in (1, 3, 800, 10_000)] == [0, 1, 400, 500]
    assert TrainConfig(updates=800, warmup=700).warmup_updates == 700
    for size in ("base", "large", "huge"):
        assert DistillConfig.imagenet256(size).warmup == 200
        assert TuneConfig.imagenet256(size).gradient_iterations == 4
    TuneConfig(updates=50)  # without an anchor its warm-up is not used
    with pytest.raises(ValueError, match="updates 100: expected more than the 100 of the warm-up"):
        TuneConfig(updates=100, anchor=0.5)
    TuneConfig(max_distance_ratio=math.inf, min_diversity_ratio=0.0, patience=10**9)  # never stop


@pytest.mark.parametrize("name", ["a/b", "a\\b", ".hidden", "..", "a\nb", "a\x00", "x" * 101, "/etc", "\ud800"])
def test_names_that_are_paths_are_refused(name):
    config = tiny_config()
    with pytest.raises(ValueError, match="plain name"):
        dataclasses.replace(config, name=name)
    with pytest.raises(ValueError, match="plain name"):
        ModelConfig.from_dict({**config.to_dict(), "name": name})


@pytest.mark.parametrize("name", ["", "tuned 2.0 (K=8)", "größer", "模型", "a:b", "x" * 100])
def test_other_names_are_fine(name):
    assert dataclasses.replace(tiny_config(), name=name).name == name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Chain(guidance=math.nan), "guidance nan"),
        (lambda: Chain(temperature=-1.0), "temperature -1.0"),
        (lambda: OneStep(timestep=999), "timestep 999.*explodes"),
        (lambda: PixelSpace((28, 28), 1, 0, 0.3, 3.0), "patch 0"),
        (lambda: PixelSpace((28, 28), 1, 5, 0.3, 3.0), "28x28 pixels.*multiples of a token's 5"),
        (lambda: PixelSpace((28, 28), 1, 4, 0.3, math.nan), "scale nan"),
        (lambda: LatentSpace((256, 256), "kl16", vae_stride=0), "vae_stride 0"),
        (lambda: LatentSpace((30, 30), "kl16"), "30x30 pixels.*multiples of a token's 16"),
        (lambda: LatentSpace((32, 32), "kl16", scale=0.0), "scale 0.0"),
        (lambda: MARConfig((4, 4), 16, 3, 16, 1, -2, 16, 1, 2, 16, 1), "encoder_heads -2"),
        (lambda: MARConfig((4, 4), 16, 3, 16, 1, 3, 16, 1, 2, 16, 1), "3 attention heads for 16 channels"),
        (lambda: MARConfig((0, 4), 16, 3, 16, 1, 2, 16, 1, 2, 16, 1), r"token_grid \(0, 4\)"),
        (lambda: dataclasses.replace(tiny_config(), iterations=0), "iterations 0"),
        (lambda: dataclasses.replace(tiny_config(), class_names=("one",)), "1 class names: expected 2"),
    ],
)
def test_configurations_check_themselves(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Folders


def test_outputs_are_checked_before_anything_is_read(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "run" / "state-00000002").mkdir(parents=True)
    (tmp_path / "run" / "state-00000002" / "run.json").write_text("{}")

    def never(*_, **__):
        raise AssertionError("something was read")

    monkeypatch.setattr("marval.cli.training.load_pipeline", never)
    monkeypatch.setattr("marval.data.load_data", never)
    monkeypatch.setattr("marval.data.load_images", never)
    verbs = (["train"], ["distill", "fashion-teacher"], ["tune", "fashion-student"])
    for verb in verbs:
        for out, flags, word in (
            ("file", [], "is a file"),
            ("file/inside", [], "is a file"),
            ("run", [], "--resume"),
            ("nowhere", ["--resume"], "nothing to resume"),
        ):
            code, told = marval(capsys, monkeypatch, *verb, "--out", tmp_path / out, *flags)
            assert (code, told.count("\n")) == (2, 1)
            assert word in told
    for out in (tmp_path, tmp_path / "file/inside"):
        code, told = marval(capsys, monkeypatch, "train", "classifier", "--out", out)
        assert (code, told.count("\n")) == (2, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]
    with pytest.raises(ValueError, match="too long"):
        check_output(tmp_path / ("x" * 300), folder=True)
    with pytest.raises(ValueError, match="cannot write /proc"):
        check_output("/proc/figures.json", folder=False)


def test_two_runs_cannot_have_one_folder_and_a_killed_one_does_not_block(tmp_path):
    out = tmp_path / "run"
    script = f"""
import time
from marval.io.files import locked
with locked({str(out / ".lock")!r}, wait=False):
    print("held", flush=True)
    time.sleep(100)
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", script], env=environment(),
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=r"run.*\.lock is held by another command"):
        run_train(out)
    assert not (out / "log.jsonl").exists()
    holder.kill()
    holder.wait()
    assert (out / ".lock").exists()
    run_train(out)
    assert not (out / ".lock").exists()


def test_a_lock_is_waited_for_and_goes_to_one_after_the_other(tmp_path):
    script = f"""
import time
from marval.io.files import locked
with locked({str(tmp_path / "lock")!r}, wait=True):
    text = open({str(tmp_path / "n")!r}).read()
    time.sleep(0.05)
    open({str(tmp_path / "n")!r}, "w").write(str(int(text) + 1))
"""
    (tmp_path / "n").write_text("0")
    runs = [subprocess.Popen([sys.executable, "-c", script], env=environment()) for _ in range(4)]
    assert [run.wait() for run in runs] == [0] * 4
    assert (tmp_path / "n").read_text() == "4"
    assert not (tmp_path / "lock").exists()
    lock = locked(tmp_path / "lock", wait=False)
    with locked(tmp_path / "lock", wait=False), pytest.raises(ValueError, match="held"):
        lock.__enter__()


def test_a_refused_run_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="sizes"):
        run_train(tmp_path / "runs" / "deep", init=MAR(dataclasses.replace(tiny_config().mar, buffer_size=3)))
    assert list(tmp_path.iterdir()) == []


def test_a_new_run_begins_a_new_log(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"update": 99}\n')
    run_train(tmp_path)
    assert [line["update"] for line in log_of(tmp_path)] == [1, 2, 3, 4]


# Resuming


def anchor_of(seed=1, data=None, **changes):
    data = tiny_data() if data is None else data
    return tuning.Anchor(tiny_model(seed), data, dataclasses.replace(DISTILL, **changes))


ANCHORED = dataclasses.replace(FINETUNE, anchor=0.5, anchor_warmup=1)
WITH_FACTORS = WeightedReward({"mine:brightness": (brightness, 1.0)})


@pytest.mark.parametrize(
    ("run", "first", "second", "words"),
    [
        (run_train, {}, {"data": other_data()}, "data_set was 64 images"),
        (run_train, {}, {"init": tiny_model()}, "init was fresh weights, now init"),
        (run_distill, {}, {"teacher": 1}, "teacher was tiny"),
        (run_distill, {}, {"data": other_data()}, "data_set was 64 images"),
        (run_tune, {}, {"reward": darkness}, "reward was brightness=1 .*, now darkness=1"),
        (
            run_tune,
            {"reward": WITH_FACTORS},
            {"reward": WeightedReward({"mine:brightness": (brightness, -1.0)})},
            "reward was mine:brightness=1 .*, now mine:brightness=-1",
        ),
        (run_tune, {}, {"student": 1}, "student was tiny"),
        (
            run_tune,
            {},
            {"settings": dataclasses.replace(FINETUNE, prompt="one {}")},
            "prompt was a high-quality and harmonious picture of {}, now one {}",
        ),
        (
            run_tune,
            {"settings": ANCHORED, "anchor": anchor_of()},
            {"settings": ANCHORED, "anchor": anchor_of(2)},
            "teacher was teacher",
        ),
        (
            run_tune,
            {"settings": ANCHORED, "anchor": anchor_of()},
            {"settings": ANCHORED, "anchor": anchor_of(guidance=3.0)},
            "anchoring.guidance was 1.5, now 3.0",
        ),
        (
            run_tune,
            {"settings": ANCHORED, "anchor": anchor_of()},
            {"settings": ANCHORED, "anchor": anchor_of(data=other_data())},
            "anchor_data was 64 images",
        ),
    ],
)
def test_resuming_refuses_another_origin_and_names_both(run, first, second, words, tmp_path):
    run(tmp_path / "run", **first)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(ValueError, match=rf"holds another run: .*{words}.*--resume may change updates, "):
        run(tmp_path / "run", resume=True, **second)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    run(tmp_path / "run", resume=True, **first)


def test_resuming_may_change_what_it_lists(tmp_path):
    run_train(tmp_path / "run")
    longer = dataclasses.replace(TRAIN, updates=6, warmup=2, decay=1, learning_rate=2e-3, save_every=3, accumulate=2)
    assert run_train(tmp_path / "run", resume=True, settings=longer) == 6


def test_a_state_of_an_earlier_version_is_resumed_with_a_word(tmp_path, capsys, monkeypatch):
    run_train(tmp_path / "run")
    (told,) = (tmp_path / "run").glob("state-*/run.json")
    run = json.loads(told.read_text())
    for name in ("data_set", "init"):
        del run["settings"][name]
    run["settings"] |= {"source": "", "warmup": 500}
    told.write_text(json.dumps(run))
    longer = dataclasses.replace(TRAIN, updates=6)
    assert run_train(tmp_path / "run", resume=True, settings=longer) == 6
    assert "another version of marval, which did not say data_set, init" in capsys.readouterr().err


def test_a_resumed_log_counts_what_was_skipped_before(tmp_path, monkeypatch):
    original, calls = teacher_module.teacher_loss, []

    def broken(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyError("killed")
        return original(*arguments) * (math.nan if len(calls) == 2 else 1.0)

    monkeypatch.setattr(teacher_module, "teacher_loss", broken)
    with pytest.raises(KeyError):
        run_train(tmp_path / "run")
    run_train(tmp_path / "run", resume=True)
    assert [(line["update"], line["skipped"]) for line in log_of(tmp_path / "run")] == [(1, 0), (2, 1), (3, 1), (4, 1)]


def test_updates_in_a_row_are_counted_across_a_resume(tmp_path, monkeypatch):
    original = teacher_module.teacher_loss
    monkeypatch.setattr(teacher_module, "teacher_loss", lambda *arguments: original(*arguments) * math.nan)
    monkeypatch.setattr("marval.runtime.log.MOST_SKIPPED", 3)
    settings = dataclasses.replace(TRAIN, updates=2)
    run_train(tmp_path / "run", settings=settings)
    with pytest.raises(ValueError, match="3 updates in a row were skipped up to update 3"):
        run_train(tmp_path / "run", resume=True, settings=dataclasses.replace(settings, updates=4))


# Values that are not finite


@pytest.mark.parametrize("broken", ["ema", "model"])
def test_weights_that_are_not_finite_are_never_saved(broken, tmp_path, monkeypatch):
    out, original = tmp_path / "run", teacher_module.update_ema

    @torch.no_grad()
    def breaks(ema, model, updates, decay):
        original(ema, model, updates, decay)
        if updates == 3:
            next(iter({"ema": ema, "model": model}[broken].parameters())).fill_(math.nan)

    monkeypatch.setattr(teacher_module, "update_ema", breaks)
    with pytest.raises(ValueError, match=r"not finite .*lower the learning rate"):
        run_train(out)
    assert load(out).sample([0]).isfinite().all()
    (state,) = out.glob("state-*")
    assert state.name == "state-00000002"
    assert all(value.isfinite().all() for file in state.glob("*.safetensors") for value in load_file(file).values())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_model_that_is_not_finite_is_refused_where_it_is_read(value, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.state_dict()["diffloss.net.final_layer.linear.bias"][1] = value
    save_model(tmp_path, model, tiny_config(), torch.bfloat16)
    with pytest.raises(ValueError, match=r"final_layer.linear.bias holds values that are not finite"):
        load_model(tmp_path)


def test_an_official_checkpoint_that_is_not_finite_is_not_converted(tmp_path):
    from marval.io.official import Hints, official_model

    mar = MARConfig((4, 4), 16, 3, 16, 1, 2, 16, 1, 2, 16, 1, buffer_size=2)
    tensors = MAR(mar).initialize(generator(0)).state_dict()
    tensors["z_proj.weight"][0, 0] = math.nan
    torch.save({"model_ema": tensors}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth: z_proj.weight holds values that are not finite"):
        official_model(tmp_path / "a.pth", Hints(heads=2))


def test_a_reward_that_is_not_finite_on_one_process_ends_all_of_them_with_its_words(tmp_path):
    script = command("parallel_run.py", 2, "tune", tmp_path / "run", 20, "broken_rank=1")
    done = subprocess.run(script, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.count("ValueError: reward mine: not finite for the prompt") == 2


# Signals


def interrupted(steps, times):
    """How many of a loop's steps are done where Ctrl-C is pressed so many times in its first one."""
    done = 0
    with start_workers("cpu") as workers:
        for _ in workers.updates(3, 3 + steps):
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
            done += 1
            if workers.stopping():
                break
        assert done == 1
    return done


def test_ctrl_c_lets_a_step_end_and_the_second_one_does_not():
    assert interrupted(1, 0) == 1
    with pytest.raises(KeyboardInterrupt, match="what it did is saved"):
        interrupted(9, 1)
    with pytest.raises(KeyboardInterrupt, match="at once"):
        interrupted(9, 2)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_before_the_first_step_saves_nothing_and_says_so(capsys, monkeypatch, tmp_path):
    def probe(*_, **__):
        return lambda pipeline: os.kill(os.getpid(), signal.SIGINT) or time.sleep(9)

    monkeypatch.setattr("marval.evaluate.probe.probe", probe)
    code, told = marval(capsys, monkeypatch, "tune", "fashion-student", "--out", tmp_path / "run")
    assert (code, told) == (130, "marval: interrupted: nothing was saved\n")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of tiny pictures in two classes."""
    from PIL import Image

    root = tmp_path_factory.mktemp("pictures")
    data = tiny_data()
    for i in range(16):
        folder = root / data.class_names[data.labels[i]]
        folder.mkdir(exist_ok=True)
        Image.fromarray(data.images[i, 0].numpy()).save(folder / f"{i}.png")
    return root


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_saves_says_how_to_go_on_and_exits_with_130(processes, pictures, tmp_path):
    out = tmp_path / "run"
    arguments = ["train", "--data", f"folder:{pictures}", "--batch-size", 4, "--no-autocast", "--out", out]
    process = subprocess.Popen(
        python(processes, "-m", "marval", *arguments, "--updates", 100_000, "--log-every", 1),
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (out / "log.jsonl").is_file() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    (state,) = out.glob("state-*")
    step = json.loads((state / "run.json").read_text())["update"]
    assert log_of(out)[-1]["update"] == step >= 1
    assert f"{step} of 100000 updates done" in said
    assert "marval: interrupted: what it did is saved, go on with --resume" in errors
    if processes == 1:  # torchrun has an exit code of its own
        assert process.returncode == 130
        assert len(errors.splitlines()) == 1
    assert not (out / ".lock").exists()
    done = subprocess.run(
        python(1, "-m", "marval", *arguments, "--updates", step + 1, "--resume"), env=environment(), timeout=60
    )
    assert done.returncode == 0
