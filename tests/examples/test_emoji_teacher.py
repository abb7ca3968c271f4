"""The example's teacher has the sizes asked for, goes on after it ended, and is a model like any other."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import marval as package
from marval.cli.options import read
from texts import write_captioned

SCRIPT = Path(__file__).parents[2] / "examples/emoji/train_teacher.py"
SMALL = "--width 16 --depth 1 --heads 2 --head-width 8 --head-depth 1 --batch-size 4 --device cpu"


@pytest.fixture
def train(monkeypatch, tmp_path, encoder):
    spec = importlib.util.spec_from_file_location("train_teacher", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_teacher", module)
    spec.loader.exec_module(module)
    data = f"folder:{write_captioned(tmp_path / 'pictures')}"

    def run(*words, out="run"):
        typed = [data, "--out", str(tmp_path / out), *SMALL.split(), *words]
        read(module.train, typed, "train_teacher.py")()
        return package.load(tmp_path / out)

    return run


def test_it_trains_a_network_of_any_size_and_goes_on(train, tmp_path):
    first = train("--updates", "2")
    mar = first.config.mar
    assert (mar.encoder_dim, mar.decoder_depth, mar.head_width, mar.dropout) == (16, 1, 8, 0.1)
    more = train("--updates", "4", "--resume")
    assert not more.model.head.input_proj.weight.equal(first.model.head.input_proj.weight)
    assert len(more.sample(["taxi, 3d style", "shark, flat style"], iterations=2, seed=1)) == 2
    begun = train("--updates", "1", "--learning-rate", "1e-9", "--init", str(tmp_path / "run"), out="other")
    torch.testing.assert_close(begun.model.decoder_embed.weight, more.model.decoder_embed.weight)
    with pytest.raises(ValueError, match="encoder_dim was 16, now 32"):
        train("--updates", "6", "--resume", "--width", "32")
