"""Models on disk: they come back as they were, a stranger's do no harm, and files are written whole or not at all."""

import dataclasses
import json
import pickle
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from marval.config import Chain, LatentSpace, OneStep
from marval.io.checkpoint import WEIGHTS, load_model, save_model
from marval.io.files import atomic_folder, atomic_path
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


def refused(folder, message):
    """Loading is refused in one short line."""
    with pytest.raises(ValueError, match=message) as caught:
        load_model(folder)
    assert len(str(caught.value)) < 1000
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_token": None}, "mask_token is missing"),
        ({"extra": torch.zeros(1)}, "unknown tensor extra"),
        ({"z_proj.bias": torch.zeros(3)}, r"z_proj.bias has shape \(3,\), expected \(16,\)"),
        ({"z_proj.bias": torch.full((16,), float("inf"))}, "z_proj.bias holds values that are not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, tmp_path):
    save_model(tmp_path, tiny_model(), tiny_config())
    tensors = {k: v for k, v in {**load_file(tmp_path / WEIGHTS), **change}.items() if v is not None}
    save_file(tensors, tmp_path / WEIGHTS, metadata={"marval": json.dumps(tiny_config().to_dict())})
    refused(tmp_path, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../elsewhere"}, r"name (is )?'../elsewhere': expected a plain name"),
        ({"data": "folder://host/share"}, "it names 'folder://host/share': expected a place on this machine"),
        ({"data": "\\\\host\\share"}, "expected a place on this machine"),
        ({"space": dataclasses.asdict(LatentSpace((64, 64), "//host/vae"))}, "it names '//host/vae'"),
        ({"reward": "os:getcwd"}, "unexpected keyword argument 'reward'"),  # no file may name code
        ({"mar__encoder_depth": 10**9}, "1000000004 blocks, but 80 tensors"),
        ({"mar__encoder_dim": 10**15}, "damaged or no model of marval"),
        ({"mar__mlp_ratio": float("nan")}, "mlp_ratio (is )?nan"),
        ({"space__image_size": [10**9, 10**9]}, "pictures of 1000000000x1000000000 pixels|the network draws"),
        ({"space__image_size": 8}, "damaged or no model of marval"),
        ({"class_names": [1, 2]}, r"class_names (is )?\(1, 2\)"),
    ],
)
def test_a_malformed_configuration_is_refused_in_one_line(change, message, tmp_path, unchecked):
    values = tiny_config().to_dict()
    for name, value in change.items():
        part, _, field = name.rpartition("__")
        (values[part] if part else values)[field] = value
    save_file(tiny_model().state_dict(), tmp_path / WEIGHTS, metadata={"marval": json.dumps(values)})
    refused(tmp_path, message)


NO_CONFIGURATIONS = ["[" * 100_000, "[]", "null", "1" * 5000, '{"space": {}}', ""]
NO_WEIGHTS = [
    b"", b"hello", struct.pack("<Q", 2**63) + b"{", struct.pack("<Q", 2) + b"{}",
    struct.pack("<Q", 10**6) + b"[" * 10**6, pickle.dumps({"model": 1}),
]  # fmt: skip


@pytest.mark.parametrize("content", [*NO_CONFIGURATIONS, *NO_WEIGHTS], ids=lambda content: str(content[:9]))
def test_what_is_no_model_is_refused_in_one_line(content, tmp_path):
    if isinstance(content, str):
        save_file({"a": torch.zeros(1)}, tmp_path / WEIGHTS, metadata={"marval": content})
    else:
        (tmp_path / WEIGHTS).write_bytes(content)
    refused(tmp_path, WEIGHTS)


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


def test_pictures_round_and_grids_hold_every_image():
    image = torch.tensor([[[0.0, 0.5], [1.0, 0.998]]])
    assert np.asarray(to_pil(image)).tolist() == [[0, 128], [255, 254]]
    picture = grid([image.expand(3, 1, 2, 2)] * 2, ["one", "two"], ["a", "b", "c"], "title", scale=10)
    assert (np.asarray(picture.convert("L")) == 0).sum() >= 6 * 100
    assert picture.width > 3 * 20
