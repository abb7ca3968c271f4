"""TensorBoard's event files beside a run's log."""

import dataclasses
import json
import sys

import pytest

from marval.cli import main
from marval.presets import TrainConfig
from marval.runtime.distributed import Workers
from marval.runtime.folder import open_run
from marval.runtime.log import LOG, Log
from marval.train.teacher import train_teacher
from pictures import make_pictures
from tiny import tiny_config, tiny_data

SETTINGS = TrainConfig(updates=4, batch_size=8, warmup=1, log_every=1, save_every=2, autocast=False)


def train(folder, resume=False, **changes):
    with open_run(folder, resume=resume, tensorboard=True) as run:
        train_teacher(tiny_config(), dataclasses.replace(SETTINGS, **changes), tiny_data(), run)


def test_the_events_are_the_logs_figures_also_after_a_resumed_run(tmp_path):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tmp_path, updates=2)
    train(tmp_path, resume=True)
    events = reading.EventAccumulator(str(tmp_path)).Reload()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [1, 2, 3, 4]
    assert {"loss", "gradient_norm", "learning_rate"} <= set(events.Tags()["scalars"])
    for name in set(lines[0]) - {"update"}:
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == [1, 2, 3, 4]
        assert [scalar.value for scalar in scalars] == pytest.approx([line[name] for line in lines], rel=1e-5)


def test_what_was_written_beyond_the_saved_state_is_void(tmp_path):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, values in ((0, (1.0, 2.0, 9.0)), (2, (3.0, 4.0))):
        log = Log(tmp_path / LOG, Workers(), start, 4, 8, tensorboard=True)
        for i, value in enumerate(values):
            log(start + i + 1, {"loss": value})
    events = reading.EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def test_without_the_package_nothing_starts(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command_has_a_flag_for_it(tmp_path, monkeypatch):
    make_pictures(tmp_path / "pictures", ("apple", "pear"), 8)
    command = f"marval train --data folder:{tmp_path}/pictures --updates 1 --batch-size 4 --out {tmp_path}/run"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--device", "cpu", "--tensorboard"])
    main()
    assert len(list((tmp_path / "run").glob("events.out.tfevents.*"))) == 1
