"""Models on disk: they come back as they were, strictly; and files are written whole or not at all."""

import dataclasses
import errno
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from marval.config import Chain, LatentSpace, MARConfig, ModelConfig, OneStep
from marval.io.checkpoint import WEIGHTS, load_model, save_model
from marval.io.files import atomic_folder, atomic_path, locked
from marval.io.images import grid, to_pil
from tiny import tiny_config, tiny_model


@pytest.mark.parametrize("draw", [OneStep(), Chain(guidance=2.0, diffusion_steps=50)])
def test_a_model_comes_back_as_it_was(draw, tmp_path):
    model, config = tiny_model(), dataclasses.replace(tiny_config(), draw=draw)
    save_model(tmp_path, model, config)
    again, read = load_model(tmp_path)
    assert read == config
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(json.dumps(config.to_dict()))
    (tmp_path / "config.json").unlink()
    assert load_model(tmp_path / WEIGHTS)[1] == config  # the weights' file alone is a whole model
    assert (tmp_path / WEIGHTS).stat().st_mode & 0o044  # which others may read, too
    save_model(tmp_path, model, config, torch.float16)
    half = load_model(tmp_path)[0].state_dict()
    assert {value.dtype for value in half.values()} == {torch.float32}
    torch.testing.assert_close(half["z_proj.weight"], model.state_dict()["z_proj.weight"], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_token": None}, "mask_token is missing"),
        ({"extra": torch.zeros(1)}, "unknown tensor extra"),
        ({"z_proj.bias": torch.zeros(3)}, r"z_proj.bias has shape \(3,\), expected \(16,\)"),
        ({"z_proj.bias": torch.zeros(16, dtype=torch.int32)}, "z_proj.bias has torch.int32"),
        ({"z_proj.bias": torch.full((16,), float("inf"))}, "z_proj.bias holds values that are not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, tmp_path):
    save_model(tmp_path, tiny_model(), tiny_config())
    tensors = {k: v for k, v in {**load_file(tmp_path / WEIGHTS), **change}.items() if v is not None}
    save_file(tensors, tmp_path / WEIGHTS, metadata={"marval": json.dumps(tiny_config().to_dict())})
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"marval": '{"mar": {}}'})
    with pytest.raises(ValueError, match="configuration"):
        load_model(tmp_path)


def test_configurations_survive_json():
    space = LatentSpace((256, 256), "some/vae")
    assert (space.token_grid, space.token_dim) == ((16, 16), 16)
    full = ModelConfig(MARConfig.imagenet256("base"), space, Chain(), tuple(map(str, range(1000))), 64)
    for config in (full, tiny_config()):
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("write", [atomic_path, atomic_folder])
def test_a_write_that_fails_leaves_the_old_files_and_nothing_else(write, tmp_path):
    file = tmp_path / "a" / "a.txt"
    file.parent.mkdir()
    file.write_text("old")

    def fails(error):
        with write(file if write is atomic_path else file.parent) as partial:
            (partial if write is atomic_path else partial / "a.txt").write_text("new, but not all of i")
            raise error

    with pytest.raises(KeyboardInterrupt):
        fails(KeyboardInterrupt())
    with pytest.raises(ValueError, match=r"cannot write .*a.*: No space left on device; free some space"):
        fails(OSError(28, "No space left on device"))
    assert file.read_text() == "old"
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["a", "a.txt"]


def test_a_disk_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "lock", wait=True), locked(tmp_path / "lock", wait=False):
        pass
    assert not (tmp_path / "lock").exists()


def test_pictures_round_and_grids_hold_every_image():
    image = torch.tensor([[[0.0, 0.5], [1.0, 0.998]]])
    assert np.asarray(to_pil(image)).tolist() == [[0, 128], [255, 254]]
    picture = grid([image.expand(3, 1, 2, 2)] * 2, ["one", "two"], ["a", "b", "c"], "title", scale=10)
    assert (np.asarray(picture.convert("L")) == 0).sum() >= 6 * 100
    assert picture.width > 3 * 20
