"""Official checkpoints: sizes read off the tensors, strict, never executed, the same bits in marval's form."""

import argparse
import dataclasses
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from marval.config import MARConfig
from marval.io.checkpoint import load_model
from marval.io.official import infer_config, official_model
from marval.model import MAR
from marval.runtime.rng import generator

CONFIG = MARConfig(
    (4, 4), 32, 7,
    encoder_dim=24, encoder_depth=3, encoder_heads=2, decoder_dim=32, decoder_depth=2, decoder_heads=2,
    head_width=40, head_depth=4, buffer_size=5, dropout=0.2,
)  # fmt: skip
ARGS = {"img_size": 128, "vae_stride": 16, "patch_size": 2, "diffloss_w": 40, "cfg": 2.9, "proj_dropout": 0.2}


@pytest.fixture(scope="module")
def tensors():
    return MAR(CONFIG).initialize(generator("official")).state_dict()


def write(file, tensors, **args):
    """A checkpoint whose averaged weights are `tensors`, without those that are None."""
    tensors = {name: t for name, t in tensors.items() if t is not None}
    other = {name: t + 1 for name, t in tensors.items()}
    args = argparse.Namespace(**{**ARGS, **args})
    torch.save({"model": other, "model_ema": tensors, "args": args, "epoch": 3}, file)
    return file


def test_sizes_are_read_off_the_tensors_and_ema_is_taken(tensors, tmp_path):
    file = write(tmp_path / "checkpoint-last.pth", tensors)
    model, config = official_model(file, 2)
    assert config.mar == CONFIG
    assert (config.space.image_size, config.space.latent_channels) == ((128, 128), 8)
    assert config.draw.guidance == 2.9
    assert config.class_names[:2] == ("0", "1")
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    wide = {**tensors, "class_emb.weight": torch.zeros(1000, 24)}
    names = official_model(write(tmp_path / "b.pth", wide), 2)[1].class_names
    assert (names[0], names[207], names[999]) == ("tench", "golden retriever", "toilet tissue")
    (tmp_path / "flat").mkdir()
    save_file(tensors, tmp_path / "flat/mar-tiny.safetensors")
    for path in (tmp_path / "flat", tmp_path / "flat/mar-tiny.safetensors"):  # without args
        assert official_model(path, 2)[1].mar == dataclasses.replace(CONFIG, dropout=0.1)


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_full_size_heads_come_from_the_widths(size):
    with torch.device("meta"):
        tensors = MAR(MARConfig.imagenet256(size)).state_dict()
    mar, space = infer_config(tensors, {}, None, "mar.pth")
    assert mar == MARConfig.imagenet256(size)
    assert space.image_size == (256, 256)


def test_a_model_is_converted_bit_by_bit_and_nothing_is_written_over_without_force(tensors, tmp_path, marval, refusal):
    file, model = write(tmp_path / "a.pth", tensors), tmp_path / "model"
    there = "mar", file, model, "--heads", 2
    marval("convert", *there)
    assert all(torch.equal(value, tensors[name]) for name, value in load_model(model)[0].state_dict().items())
    (model / "notes.txt").write_text("mine")
    write(file, {name: t + 2 for name, t in tensors.items()})
    assert "exists already: choose another place, or write over it with --force" in refusal("convert", *there)
    assert "what it would be made from" in refusal("convert", "mar", file, file, "--heads", 2, "--force")
    assert "what it would be made from" in refusal("convert", "mar", file, tmp_path, "--heads", 2, "--force")
    assert torch.equal(load_model(model)[0].mask_token, tensors["mask_token"])
    marval("convert", *there, "--force")
    assert torch.equal(load_model(model)[0].mask_token, tensors["mask_token"] + 2)
    assert (model / "notes.txt").read_text() == "mine"


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_pickle_that_would_run_code_is_refused_before_it_does(tensors, tmp_path, refusal):
    torch.save({"model_ema": tensors, "args": Malicious()}, "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps({"model_ema": Malicious()}, protocol=2))
    for name in ("a.pth", "b.pth"):
        for kind in ("mar", "vae"):
            assert "is refused: it is damaged, no checkpoint, or would run code" in refusal(
                "convert", kind, name, "out"
            )
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("change", "args", "message"),
    [
        ({"decoder_norm.bias": None}, {}, "decoder_norm.bias is missing"),
        ({"z_proj.weight": torch.zeros(24, 0)}, {}, "z_proj.weight of an official MAR checkpoint is missing or of"),
        ({"z_proj.bias": torch.zeros(3)}, {}, r"z_proj.bias has shape \(3,\)"),
        ({"decoder_embed.weight": torch.zeros(9, 24)}, {}, "widths 24 and 9 do not say the attention heads"),
        ({}, {"img_size": 256}, "16 tokens of 32 channels, a patch size of 2, .* images of 256 pixels contradict"),
    ],
)
def test_tensors_and_args_that_do_not_fit_are_named(change, args, message, tensors, tmp_path):
    file = write(tmp_path / "a.pth", {**tensors, **change}, **args)
    with pytest.raises(ValueError, match=rf"a\.pth: .*{message}"):
        official_model(file, None if "decoder_embed.weight" in change else 2)


def test_files_that_are_no_checkpoints_are_refused_in_one_line(tensors, tmp_path, refusal):
    whole = write(tmp_path / "whole.pth", tensors).read_bytes()
    (tmp_path / "in").mkdir()
    torch.save({"weights": tensors}, tmp_path / "in/other.pth")
    (tmp_path / "in/text.safetensors").write_bytes(b"not a checkpoint\n")
    (tmp_path / "in/cut.pth").write_bytes(whole[: len(whole) // 2])
    for name in ("other.pth", "text.safetensors", "cut.pth"):
        for kind in ("mar", "vae"):
            assert name in refusal("convert", kind, f"in/{name}", "out")
    assert "folder with one" in refusal("convert", "mar", "in", "out")
    assert "found none" in refusal("convert", "mar", "absent", "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "whole.pth"]
