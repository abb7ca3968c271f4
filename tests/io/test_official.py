"""Official checkpoints: sizes read off the tensors, strict, never executed, and the same bits on the way back."""

import argparse
import dataclasses
import os
import pickle
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from marval.config import MARConfig
from marval.io.official import Hints, infer_config, official_model, read_official
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
    other = {name: t + 1 for name, t in tensors.items()}
    content = {"model": other, "model_ema": tensors, "args": argparse.Namespace(**{**ARGS, **args}), "epoch": 3}
    torch.save(content, file)
    return file


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_sizes_are_read_off_the_tensors_and_ema_is_taken(tensors, tmp_path):
    file = write(tmp_path / "checkpoint-last.pth", tensors)
    model, config = official_model(file, Hints(heads=2))
    assert config.mar == CONFIG
    assert (config.space.image_size, config.space.latent_channels) == ((128, 128), 8)
    assert config.draw.guidance == 2.9
    assert config.class_names[:2] == ("0", "1")
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    model, _ = official_model(file, Hints(heads=2), ema=False)
    assert torch.equal(model.state_dict()["mask_token"], tensors["mask_token"] + 1)
    wide = {**tensors, "class_emb.weight": torch.zeros(1000, 24)}
    names = official_model(write(tmp_path / "b.pth", wide), Hints(heads=2))[1].class_names
    assert (names[0], names[207], names[999]) == ("tench", "golden retriever", "toilet tissue")
    (tmp_path / "flat").mkdir()
    save_file(tensors, tmp_path / "flat/mar-tiny.safetensors")
    for path in (tmp_path / "flat", tmp_path / "flat/mar-tiny.safetensors"):
        flat = official_model(path, Hints(heads=2, patch_size=2))[1]
        assert flat.mar == dataclasses.replace(CONFIG, dropout=0.1)


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_full_size_heads_come_from_the_widths(size):
    with torch.device("meta"):
        tensors = MAR(MARConfig.imagenet256(size)).state_dict()
    mar, space = infer_config(tensors, {}, Hints(), "mar.pth")
    assert mar == MARConfig.imagenet256(size)
    assert space.image_size == (256, 256)


def test_there_and_back_is_bit_identical_and_nothing_is_written_over_without_force(tensors, tmp_path, marval, refusal):
    file, model, back = write(tmp_path / "a.pth", tensors), tmp_path / "model", tmp_path / "back.pth"
    there = "mar", file, model, "--heads", 2
    marval("convert", *there)
    marval("convert", "to-mar", model, back)
    again, _ = read_official(back)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert back.stat().st_size < 1.5 * (model / "model.safetensors").stat().st_size
    (model / "notes.txt").write_text("mine")
    write(file, {name: t + 2 for name, t in tensors.items()})
    before = contents(tmp_path)
    for arguments in (there, ("to-mar", model, back), ("mar", file, back, "--heads", 2)):
        assert "exists already: choose another place, or write over it with --force" in refusal("convert", *arguments)
    assert contents(tmp_path) == before
    marval("convert", *there, "--force")
    marval("convert", "to-mar", model, back, "--force")
    assert torch.equal(read_official(back)[0]["mask_token"], tensors["mask_token"] + 2)
    assert (model / "notes.txt").read_text() == "mine"


def test_a_model_is_never_written_over_itself(tensors, tmp_path, marval, refusal):
    file, model = write(tmp_path / "a.pth", tensors), tmp_path / "run/model"
    marval("convert", "mar", file, model, "--heads", 2)
    (tmp_path / "flat").mkdir()
    save_file(tensors, tmp_path / "flat/model.safetensors")
    before = contents(tmp_path)
    for arguments in (
        ("to-mar", tmp_path / "run", model / "model.safetensors"),
        ("to-mar", model / "model.safetensors", model / "model.safetensors"),
        ("mar", tmp_path / "flat", tmp_path / "flat", "--heads", 2, "--patch-size", 2),
        ("mar", file, file, "--heads", 2),
    ):
        refusal("convert", *arguments, "--force")
    assert contents(tmp_path) == before


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_pickle_that_would_run_code_is_refused_before_it_does(tensors, tmp_path, refusal):
    torch.save({"model_ema": tensors, "args": Malicious()}, "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps({"model_ema": Malicious()}, protocol=2))
    for name in ("a.pth", "b.pth"):
        for kind in ("mar", "vae"):
            assert re.search("is refused: .*system", refusal("convert", kind, name, "out"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_norm.bias": None}, "decoder_norm.bias is missing"),
        ({"z_proj.weight": None}, "z_proj.weight is missing"),
        ({"z_proj.weight": torch.zeros(24, 0)}, r"z_proj.weight has shape \(24, 0\)"),
        ({"decoder_norm.bias": [1.0]}, "decoder_norm.bias in model_ema is a list"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, tensors, tmp_path):
    changed = {name: t for name, t in {**tensors, **change}.items() if t is not None}
    torch.save({"model_ema": changed, "args": argparse.Namespace(**ARGS)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=rf"a\.pth: .*{message}"):
        official_model(tmp_path / "a.pth", Hints(heads=2))


@pytest.mark.parametrize(
    ("args", "hints", "words"),
    [
        ({}, Hints(heads=2, image_size=256), ["256", "128"]),
        ({"img_size": 256}, Hints(heads=2), ["256", "128"]),
        ({"diffloss_w": 64}, Hints(heads=2), ["64", "40"]),
        ({}, Hints(heads=2, patch_size=1), ["1", "2"]),
        ({}, Hints(heads=5), ["24", "--heads"]),
        ({"vae_stride": "16"}, Hints(heads=2), ["its args say vae_stride '16'"]),
        ({"cfg": "much"}, Hints(heads=2), ["its args say"]),
        ({"proj_dropout": None}, Hints(heads=2), ["its args say proj_dropout None"]),
    ],
)
def test_contradictions_name_both_and_args_that_cannot_be_are_refused(args, hints, words, tensors, tmp_path):
    with pytest.raises(ValueError, match=r"a\.pth") as error:
        official_model(write(tmp_path / "a.pth", tensors, **args), hints)
    assert all(word in str(error.value) for word in words)


def test_settings_that_cannot_be_are_refused_before_anything_is_read(tmp_path, tensors, refusal, monkeypatch):
    file = write(tmp_path / "a.pth", tensors)
    for module in ("official", "vae"):
        monkeypatch.setattr(f"marval.io.{module}.read_checkpoint", lambda *_: pytest.fail("it was read"))
    for option, value in [("heads", -2), ("heads", 0), ("vae-stride", 0), ("patch-size", -1), ("image-size", 0)]:
        assert f"--{option} {value}" in refusal("convert", "mar", file, "model", f"--{option}", value)
    (tmp_path / "taken").mkdir()
    for out in (tmp_path / "taken", file / "model"):
        for kind in ("mar", "vae"):
            refusal("convert", kind, file, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "taken"]


def test_files_that_are_no_checkpoints_are_refused_in_one_line(tensors, tmp_path, refusal):
    whole = write(tmp_path / "whole.pth", tensors).read_bytes()
    (tmp_path / "in").mkdir()
    torch.save({"weights": tensors}, tmp_path / "in/other.pth")
    for name, content in {
        "empty.pth": b"", "text.pth": b"not a checkpoint\n", "number.pth": b"\x80", "cut.pth": whole[: len(whole) // 2],
        "text.safetensors": b"not a checkpoint\n", "empty.safetensors": b"", "other.pth": None,
    }.items():  # fmt: skip
        if content is not None:
            (tmp_path / "in" / name).write_bytes(content)
        for kind in ("mar", "to-mar", "vae"):
            assert name in refusal("convert", kind, f"in/{name}", "out.pth")
    assert "folder with one" in refusal("convert", "mar", "in", "out")
    assert "found none" in refusal("convert", "mar", "absent", "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "whole.pth"]


MEMORY = """
import sys
from pathlib import Path
def memory(name):
    return int(next(x for x in Path('/proc/self/status').read_text().splitlines() if x.startswith(name)).split()[1])
import torch, marval.io.official, marval.io.checkpoint
before = memory('VmRSS')
sys.argv = ['marval', 'convert', *sys.argv[1:]]
from marval.cli import main
main()
print(1024 * (memory('VmHWM') - before))
"""


@pytest.mark.slow
def test_converting_mar_base_takes_little_more_memory_than_its_weights(tmp_path):
    """Both ways at most 1.2 times the weights' bytes, mapped pages counted."""
    tensors = MAR(MARConfig.imagenet256("base")).state_dict()
    weights = sum(tensor.nbytes for tensor in tensors.values())
    torch.save({"model": tensors, "model_ema": {k: v.clone() for k, v in tensors.items()}}, tmp_path / "base.pth")
    del tensors
    for arguments in (("mar", "base.pth", "out"), ("to-mar", "out", "back.pth")):
        command = [sys.executable, "-c", MEMORY, *arguments]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True)
        assert int(run.stdout.splitlines()[-1]) <= 1.2 * weights
