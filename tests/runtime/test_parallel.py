"""Several processes do what one does, states move between numbers of processes, and kills and signals lose nothing."""

import json
import os
import random
import re
import signal
import subprocess
import time

import pytest
import torch

from marval.runtime.distributed import Workers, start_workers
from processes import command, environment, launch
from training import log_of, weights_of

SCRIPT = "parallel_run.py"


def assert_close(first, second, tolerance=1e-5):
    """Equal but for the bias of attention's keys: softmax ignores it, so Adam amplifies mere rounding there."""
    assert first.keys() == second.keys()
    for key, value in first.items():
        if key.endswith("qkv.bias"):
            width = len(value) // 3
            for side in (first, second):
                side[key][width : 2 * width] = 0
        torch.testing.assert_close(value, second[key], rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Every stage by one process, 20 updates, started when it is first asked for."""
    runs = {}

    def run(stage):
        if stage not in runs:
            runs[stage] = tmp_path_factory.mktemp(stage) / "run"
            launch(SCRIPT, 1, stage, runs[stage], 20)
        return runs[stage]

    return run


SPLIT = ("accumulate=3", "checkpoint_blocks=1")
SHARDED = ("shard=1",)


@pytest.mark.parametrize(
    ("stage", "processes", "how"),
    [
        ("train", 1, SPLIT), ("train", 2, ()), ("train", 2, SHARDED), ("distill", 2, ()), ("distill", 3, SHARDED),
        ("cached", 2, SHARDED),
        ("tune", 2, ()), ("tune", 2, SHARDED), ("joint", 1, SPLIT), ("joint", 2, SHARDED),
        ("anchored", 1, SPLIT), ("anchored", 2, ()), ("anchored", 3, SHARDED),
        ("distance", 1, SPLIT), ("distance", 2, ()),
    ],
)  # fmt: skip
def test_processes_and_parts_equal_one(stage, processes, how, alone, tmp_path):
    launch(SCRIPT, processes, stage, tmp_path / "run", 20, *how)
    assert_close(weights_of(alone(stage)), weights_of(tmp_path / "run"))
    one, many = log_of(alone(stage)), log_of(tmp_path / "run")
    assert len(one) == len(many) >= 20
    for first, second in zip(one, many, strict=True):
        assert second == pytest.approx(first, rel=2e-4, abs=1e-5)
    assert one[0] != one[-1]


@pytest.mark.parametrize("stage", ["distill", "tune"])
def test_under_autocast_sharded_blocks_are_gathered_in_bf16(stage, tmp_path):
    """What autocast would do itself, so that it changes nothing but the order of sums."""
    launch(SCRIPT, 1, stage, tmp_path / "one", 6, "autocast=1")
    launch(SCRIPT, 2, stage, tmp_path / "two", 6, "autocast=1", *SHARDED)
    for first, second in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert second == pytest.approx(first, rel=2e-2, abs=2e-3)


def test_a_state_saved_by_two_is_resumed_by_one_and_by_three(alone, tmp_path):
    launch(SCRIPT, 2, "distill", tmp_path / "two", 12, *SHARDED)
    for processes in (1, 3):  # with whole networks
        out = tmp_path / f"on-{processes}"
        subprocess.run(["cp", "-r", tmp_path / "two", out], check=True)
        launch(SCRIPT, processes, "distill", out, 20, "--resume")
        assert_close(weights_of(alone("distill")), weights_of(out))
        assert [line["update"] for line in log_of(out)] == list(range(1, 21))


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_resumes_from_a_whole_state_and_ends_the_same(kills, alone, tmp_path):
    out, rng = tmp_path / "run", random.Random(0)
    for _ in range(kills):
        resume, states = ["--resume"] if list(out.glob("state-*/run.json")) else [], set(out.glob("state-*"))
        process = subprocess.Popen(
            command(SCRIPT, 1, "train", out, 20, "save_every=1", *resume), env=environment(), stderr=subprocess.DEVNULL
        )
        while process.poll() is None and set(out.glob("state-*")) == states:
            time.sleep(0.01)  # until it has saved once more, or is done
        time.sleep(rng.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
    launch(SCRIPT, 1, "train", out, 20, "save_every=1", "--resume")
    first, second = weights_of(alone("train")), weights_of(out)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert len(list(out.glob("state-*"))) == 1


@pytest.mark.parametrize(
    ("processes", "number", "how", "sign"),
    [
        (1, signal.SIGTERM, ("save_every=100000",), "log.jsonl"),
        (2, signal.SIGINT, ("save_every=100000",), "log.jsonl"),
        (1, signal.SIGTERM, ("save_every=3", "slow=1"), ".state-*"),  # while it writes a state
        (2, signal.SIGTERM, ("save_every=3", "slow=1"), ".state-*"),
    ],
)
def test_a_signal_saves_and_exits_cleanly(processes, number, how, sign, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(SCRIPT, processes, "train", out, 100_000, *how), env=environment(), stderr=subprocess.PIPE, text=True
    )
    while not list(out.glob(sign)) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    if processes == 1:  # torchrun's own exit code says that it was stopped
        assert process.returncode == 0, errors
    (state,) = out.glob("state-*")
    update = json.loads((state / "run.json").read_text())["update"]
    assert log_of(out)[-1]["update"] == update >= 1
    assert (out / "model/model.safetensors").is_file()
    assert not list(out.glob(".*"))  # neither the lock nor half of a state


def interrupted(times):
    """Press Ctrl-C so many times in every update of a loop, which ends after the first."""
    done = 0
    with start_workers("cpu") as workers:
        for _ in workers.updates(3, 6):
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
            done += 1
            if workers.stopping():
                break
        assert done == (1 if times else 3)


def test_ctrl_c_lets_an_update_end_and_the_second_one_does_not():
    interrupted(0)
    with pytest.raises(KeyboardInterrupt, match="what it did is saved"):
        interrupted(1)
    with pytest.raises(KeyboardInterrupt, match="at once"):
        interrupted(2)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("stage", "how", "words"),
    [
        ("tune", "broken_rank=1", "reward mine: not finite for the prompt"),
        ("train", "full_rank=1", r"\S*state-00000008 was not saved \(cannot write .*No space left on device"),
    ],
)
def test_what_fails_on_one_process_ends_all_of_them_with_its_words(stage, how, words, tmp_path):
    script = command(SCRIPT, 2, stage, tmp_path / "run", 20, how)
    done = subprocess.run(script, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert len(re.findall(f"ValueError: {words}", done.stderr)) == 2, done.stderr
    if stage == "train":
        assert [path.name for path in (tmp_path / "run").glob("*state-*")] == ["state-00000004"]


def test_rows_are_shared_out_without_gap_or_overlap():
    for count in (1, 2, 3, 5):
        for accumulate in (1, 2):
            workers = [Workers(rank, count) for rank in range(count)]
            parts = [part for worker in workers for part in worker.parts(17, accumulate)]
            assert [i for part in parts for i in range(17)[part]] == list(range(17))
            assert sum(workers[0].share(part, 17) for part in parts) == pytest.approx(count)
    with pytest.raises(ValueError, match="a batch of 3 cannot be split over 2 processes x 2 parts"):
        Workers(0, 2).parts(3, 2)
