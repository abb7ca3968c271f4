"""TensorBoard's event files beside a run's log."""

import json
import sys

import pytest

from marval.cli import main
from marval.runtime.distributed import Workers
from marval.runtime.log import LOG, Log
from pictures import make_pictures


@pytest.fixture
def train(tmp_path, monkeypatch):
    make_pictures(tmp_path / "pictures", ("apple", "pear"), 8)

    def run(*more):
        typed = f"marval train --data folder:{tmp_path}/pictures --batch-size 4 --log-every 1 --warmup 1 --out".split()
        monkeypatch.setattr(sys, "argv", [*typed, str(tmp_path / "run"), "--device", "cpu", "--tensorboard", *more])
        main()

    return run


def test_the_events_are_the_logs_figures_also_after_a_resumed_run(train, tmp_path):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train("--updates", "2")
    train("--updates", "4", "--resume")
    events = reading.EventAccumulator(str(tmp_path / "run")).Reload()
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
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


def test_without_the_package_nothing_starts(train, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit):
        train("--updates", "2")
    assert "pip install tensorboard" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
