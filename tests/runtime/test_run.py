"""A run's folder: it has one run of one origin, a whole state or the one before, and says why it refuses another."""

import dataclasses
import json
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch

from marval.model import MAR
from marval.pipeline import load
from marval.rewards import WeightedReward
from marval.runtime import state as state_module
from marval.runtime.distributed import Workers
from marval.runtime.folder import open_run
from marval.runtime.log import LOG, Log
from marval.runtime.optim import Optimizer, fast_products
from marval.train import teacher
from processes import environment
from tiny import tiny_config, tiny_data, tiny_model
from training import (
    TRAIN,
    anchor_of,
    brightness,
    log_of,
    run_anchored,
    run_distill,
    run_train,
    run_tune,
    state_of,
    weights_of,
)


def other_data():
    """Images of which one pixel differs."""
    data = tiny_data()
    data.images[5, 0, 0, 0] += 1
    return data


def darkness(images, prompts):
    return -images.mean(dim=(1, 2, 3))


def weighted(weight):
    return WeightedReward({"mine:brightness": (brightness, weight)})


@pytest.mark.parametrize(
    ("run", "first", "second", "words"),
    [
        (run_train, {}, {"batch_size": 4}, "batch_size was 8, now 4"),
        (run_train, {}, {"data": other_data()}, "data_set was 64 images"),
        (run_train, {}, {"init": tiny_model()}, "init was fresh weights, now init"),
        (run_distill, {}, {"teacher": 1}, "teacher was tiny"),
        (run_tune, {}, {"student": tiny_model(1)}, "student was tiny"),
        (run_tune, {}, {"reward": darkness}, "reward was brightness=1 .*, now darkness=1"),
        (run_tune, {"reward": weighted(1.0)}, {"reward": weighted(-1.0)}, "reward was mine:brightness=1 .*=-1"),
        (run_anchored, {}, {"anchored": anchor_of(2)}, "teacher was teacher"),
        (run_anchored, {}, {"anchored": anchor_of(objective="sid")}, "anchoring.objective was sim, now sid"),
        (run_anchored, {}, {"anchored": anchor_of(data=other_data())}, "anchor_data was 64 images"),
    ],
)
def test_resuming_refuses_another_origin_and_names_both(run, first, second, words, tmp_path):
    run(tmp_path / "run", updates=2, **first)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(ValueError, match=rf"holds another run: .*{words}.*--resume may change updates, "):
        run(tmp_path / "run", resume=True, updates=2, **{**first, **second})
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_resuming_may_change_what_it_lists_and_nothing_starts_over_a_run(tmp_path):
    with pytest.raises(ValueError, match="nothing to resume"):
        run_train(tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()
    run_train(tmp_path / "run")
    with pytest.raises(ValueError, match="--resume"):
        run_train(tmp_path / "run")
    longer = {"updates": 8, "warmup": 3, "decay": 1, "learning_rate": 2e-3, "save_every": 3, "accumulate": 2}
    assert run_train(tmp_path / "run", resume=True, **longer) == 8
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    assert load(tmp_path / "elsewhere/model").sample(["cross"], seed=3).shape == (1, 1, 8, 8)


def test_a_damaged_state_is_one_clear_error(tmp_path):
    run_train(tmp_path, updates=2)
    (state,) = tmp_path.glob("state-*")
    shard = min(state.glob("*.safetensors"))
    content = shard.read_bytes()
    for damaged in (content[:1000], b"", content[:-5]):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            run_train(tmp_path, resume=True)
    shard.write_bytes(content)
    (state / "run.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        run_train(tmp_path, resume=True)


def test_training_goes_on_while_a_state_is_written_and_its_end_waits(tmp_path, monkeypatch):
    run_train(tmp_path / "whole")
    went_on, calls, loss, write = threading.Event(), [], teacher.teacher_loss, state_module.write_tensors

    def slow(*arguments):
        assert went_on.wait(30)  # for the fourth update, while what two updates gave is being written
        time.sleep(0.3)
        write(*arguments)

    def dies_at_the_fourth(*arguments):
        calls.append(1)
        if len(calls) == 4:
            went_on.set()
            raise InterruptedError
        return loss(*arguments)

    monkeypatch.setattr(state_module, "write_tensors", slow)
    with monkeypatch.context() as killed:
        killed.setattr(teacher, "teacher_loss", dies_at_the_fourth)
        with pytest.raises(InterruptedError):
            run_train(tmp_path / "parts")
    assert state_of(tmp_path / "parts", 2)
    with open_run(tmp_path / "parts", resume=True) as run:
        teacher.train_teacher(tiny_config(), TRAIN, tiny_data(), run)
        whole, parts = state_of(tmp_path / "whole", 6), state_of(tmp_path / "parts", 6)
        first, second = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_two_runs_cannot_have_one_folder_and_a_killed_one_does_not_block(tmp_path):
    out = tmp_path / "run"
    script = f"""
import time
from pathlib import Path
from marval.runtime.folder import open_run
with open_run(Path({str(out)!r})):
    print("held", flush=True)
    time.sleep(100)
"""
    holder = subprocess.Popen([sys.executable, "-c", script], env=environment(), stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=r"run.*\.lock is held by another command"):
        run_train(out)
    assert not (out / "log.jsonl").exists()
    holder.kill()
    holder.wait()
    assert (out / ".lock").exists()
    run_train(out, updates=2)
    assert not (out / ".lock").exists()


def test_what_does_not_fit_is_refused_and_a_new_run_begins_a_new_log(tmp_path):
    with pytest.raises(ValueError, match="sizes"):
        run_train(tmp_path, init=MAR(dataclasses.replace(tiny_config().mar, buffer_size=3)))
    with pytest.raises(ValueError, match=r"a batch of 8 cannot be split over 1 processes x 9 parts"):
        run_train(tmp_path, accumulate=9)
    (tmp_path / "log.jsonl").write_text('{"update": 99}\n')
    run_train(tmp_path, updates=2)
    assert [line["update"] for line in log_of(tmp_path)] == [1, 2]


def test_tensorboard_gets_the_logs_figures_also_after_a_resumed_run(tmp_path, monkeypatch):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, values in ((0, (1.0, 2.0, 9.0)), (2, (3.0, 4.0))):
        log = Log(tmp_path / LOG, Workers(), start, 4, 8, tensorboard=True)
        for i, value in enumerate(values):
            log(start + i + 1, {"loss": value})
    events = reading.EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"), open_run(tmp_path / "run", tensorboard=True):
        pass
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("before", ["ieee", "tf32"])
def test_updates_on_a_gpu_multiply_in_tf32_and_attend_without_cudnn(before):
    products, flags = torch.backends.cuda.matmul, torch.backends.cuda
    attention = flags.cudnn_sdp_enabled()
    try:
        products.fp32_precision = before
        with fast_products(torch.device("cuda")):
            assert (products.allow_tf32, products.fp32_precision) == (True, "tf32")  # both of torch's names
            assert (flags.cudnn_sdp_enabled(), flags.flash_sdp_enabled()) == (False, True)
        assert (products.fp32_precision, flags.cudnn_sdp_enabled()) == (before, attention)
    finally:
        products.allow_tf32 = False


def test_a_log_on_gpus_has_memory_and_the_operations_of_each(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    monkeypatch.setattr(Workers, "mean", lambda self, figures: dict(figures))
    workers = Workers(count=2, device=torch.device("cuda"))
    optimizer = Optimizer(tiny_model().requires_grad_(True), Workers(), 1.0, (0.9, 0.999))
    for flops in (6e12, 0.0):
        log = Log(tmp_path / f"{flops}.jsonl", workers, 0, 10, 8, flops=flops)
        log(10, {"loss": 1.0}, [optimizer])
    found, unknown = (json.loads(file.read_text()) for file in (tmp_path / f"{flops}.jsonl" for flops in (6e12, 0.0)))
    assert found["memory_gib"] == 3
    assert found["tflops_per_gpu"] == pytest.approx(found["images_per_second"] * 3, rel=1e-5)
    assert "tflops_per_gpu" not in unknown
    assert capsys.readouterr().out.count("TFLOP/s a GPU") == 1
