"""Official checkpoints: sizes read off the tensors, strict, never executed, and the same bits on the way back."""

import argparse
import functools
import os
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from marval.cli import main
from marval.config import MARConfig
from marval.io.checkpoint import load_model, save_model
from marval.io.official import Hints, official_model, read_official, save_official
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


def test_sizes_are_read_off_the_tensors_and_ema_is_taken(tensors, tmp_path):
    file = write(tmp_path / "checkpoint-last.pth", tensors)
    model, config = official_model(file, Hints(heads=2))
    assert config.mar == CONFIG
    assert config.space.image_size == (128, 128)
    assert config.space.latent_channels == 8
    assert config.draw.guidance == 2.9
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    model, _ = official_model(file, Hints(heads=2), ema=False)
    assert torch.equal(model.state_dict()["mask_token"], tensors["mask_token"] + 1)


def test_a_thousand_classes_are_imagenets(tensors, tmp_path):
    assert official_model(write(tmp_path / "a.pth", tensors), Hints(heads=2))[1].class_names[:2] == ("0", "1")
    wide = {**tensors, "class_emb.weight": torch.zeros(1000, 24)}
    names = official_model(write(tmp_path / "b.pth", wide), Hints(heads=2))[1].class_names
    assert (names[0], names[207], names[999]) == ("tench", "golden retriever", "toilet tissue")


def test_full_size_heads_come_from_the_presets():
    from marval.io.official import Shapes, infer_config

    for size in ("base", "large", "huge"):
        with torch.device("meta"):
            tensors = MAR(MARConfig.imagenet256(size)).state_dict()
        mar, space = infer_config(Shapes(tensors, {}, "mar.pth"), Hints())
        assert mar == MARConfig.imagenet256(size)
        assert space.image_size == (256, 256)


def test_flat_safetensors_and_a_folder_with_one(tensors, tmp_path):
    save_file(tensors, tmp_path / "mar-tiny.safetensors")
    for path in (tmp_path, tmp_path / "mar-tiny.safetensors"):
        _, config = official_model(path, Hints(heads=2, patch_size=2))
        assert config.mar == CONFIG.__class__(**{**CONFIG.__dict__, "dropout": 0.1})


def test_the_round_trip_is_bit_identical(tensors, tmp_path):
    model, config = official_model(write(tmp_path / "a.pth", tensors), Hints(heads=2))
    save_model(tmp_path / "ours", model, config)
    again, _ = load_model(tmp_path / "ours")
    save_official(tmp_path / "b.pth", again)
    found, _ = read_official(tmp_path / "b.pth")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert os.path.getsize(tmp_path / "b.pth") < 1.5 * os.path.getsize(tmp_path / "ours/model.safetensors")
    assert load_file(tmp_path / "ours/model.safetensors").keys() == tensors.keys()


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_pickle_that_would_run_code_is_refused_before_it_does(tensors, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model_ema": tensors, "args": Malicious()}, "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps({"model_ema": Malicious()}, protocol=2))
    for name in ("a.pth", "b.pth"):
        with pytest.raises(ValueError, match="refused") as error:
            official_model(name)
        assert len(str(error.value).splitlines()) == 1
        assert "system" in str(error.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("decoder_norm.bias"), "decoder_norm.bias is missing"),
        (lambda t: t.pop("z_proj.weight"), "z_proj.weight is missing"),
        (lambda t: t.update(extra=torch.zeros(2)), "unknown tensor extra"),
        (lambda t: t.update({"decoder_norm.bias": torch.zeros(3)}), r"decoder_norm.bias has shape \(3,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, tensors, tmp_path):
    changed = dict(tensors)
    change(changed)
    with pytest.raises(ValueError, match=message):
        official_model(write(tmp_path / "a.pth", changed), Hints(heads=2))


@pytest.mark.parametrize(
    ("args", "given", "words"),
    [
        ({}, Hints(heads=2, image_size=256), ["256", "128"]),
        ({"img_size": 256}, Hints(heads=2), ["256", "128"]),
        ({"diffloss_w": 64}, Hints(heads=2), ["64", "40"]),
        ({}, Hints(heads=2, patch_size=1), ["1", "2"]),
        ({}, Hints(), ["24", "--heads"]),
        ({}, Hints(heads=5), ["24", "--heads"]),
    ],
)
def test_contradictions_name_both(args, given, words, tensors, tmp_path):
    with pytest.raises(ValueError, match=r"a\.pth") as error:
        official_model(write(tmp_path / "a.pth", tensors, **args), given)
    assert all(word in str(error.value) for word in words)


def test_damaged_and_absent_files(tensors, tmp_path):
    file = write(tmp_path / "a.pth", tensors)
    file.write_bytes(file.read_bytes()[:-2000])
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    for name in ("a.pth", "b.safetensors"):
        with pytest.raises(ValueError, match="damaged"):
            official_model(tmp_path / name)
    with pytest.raises(ValueError, match="found none"):
        official_model(tmp_path / "absent")
    torch.save({"weights": tensors}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match="no model_ema"):
        official_model(tmp_path / "c.pth")


def convert(*arguments, capsys, monkeypatch):
    """`marval convert` in this process: its exit code and what it says on standard error."""
    monkeypatch.setattr(sys, "argv", ["marval", "convert", *map(str, arguments)])
    capsys.readouterr()
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


@pytest.fixture
def run(capsys, monkeypatch):
    return functools.partial(convert, capsys=capsys, monkeypatch=monkeypatch)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_nothing_is_written_over_without_force(tensors, tmp_path, run):
    file, model, back = write(tmp_path / "a.pth", tensors), tmp_path / "model", tmp_path / "back.pth"
    assert run("mar", file, model, "--heads", 2) == (0, "")
    assert run("to-mar", model, back) == (0, "")
    (model / "notes.txt").write_text("mine")
    write(file, {name: t + 2 for name, t in tensors.items()})
    before = contents(tmp_path)
    for arguments in (("mar", file, model, "--heads", 2), ("to-mar", model, back), ("mar", file, back, "--heads", 2)):
        code, said = run(*arguments)
        assert code == 2
        assert "exists already" in said
        assert "--force" in said
    assert contents(tmp_path) == before
    assert run("mar", file, model, "--heads", 2, "--force") == (0, "")
    assert run("to-mar", model, back, "--force") == (0, "")
    assert torch.equal(read_official(back)[0]["mask_token"], tensors["mask_token"] + 2)
    assert (model / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_a_model_is_never_written_over_itself(force, tensors, tmp_path, run):
    file, model = write(tmp_path / "a.pth", tensors), tmp_path / "run/model"
    assert run("mar", file, model, "--heads", 2) == (0, "")
    (tmp_path / "flat").mkdir()
    save_file(tensors, tmp_path / "flat/model.safetensors")
    before = contents(tmp_path)
    for arguments in (
        ("to-mar", tmp_path / "run", model / "model.safetensors"),
        ("to-mar", model / "model.safetensors", model / "model.safetensors"),
        ("mar", tmp_path / "flat", tmp_path / "flat", "--heads", 2, "--patch-size", 2),
        ("mar", file, file, "--heads", 2),
    ):
        code, said = run(*arguments, *force)
        assert code == 2
        assert len(said.splitlines()) == 1
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--heads", -2), "--heads -2"),
        (("--heads", 0), "--heads 0"),
        (("--vae-stride", 0), "--vae-stride 0"),
        (("--patch-size", -1), "--patch-size -1"),
        (("--image-size", 100), "100"),
        (("--image-size", 0), "--image-size 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_read(options, words, tmp_path, tensors, run):
    file = write(tmp_path / "a.pth", tensors)
    code, said = run("mar", file, tmp_path / "model", *(() if "--heads" in options else ("--heads", 2)), *options)
    assert code == 2
    assert words in said
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
    code, said = run("to-mar", tmp_path, tmp_path / "b.pth", *options)
    assert code == 2
    assert len(said.splitlines()) == 1


def test_files_that_are_no_checkpoints_are_refused_in_one_line(tensors, tmp_path, run):
    whole = write(tmp_path / "whole.pth", tensors).read_bytes()
    (tmp_path / "in").mkdir()
    for name, content in {
        "empty.pth": b"", "text.pth": b"not a checkpoint\n", "number.pth": b"\x80", "cut.pth": whole[: len(whole) // 2],
        "text.safetensors": b"not a checkpoint\n", "empty.safetensors": b"",
    }.items():  # fmt: skip
        file = tmp_path / "in" / name
        file.write_bytes(content)
        for kind in ("mar", "to-mar", "vae"):
            code, said = run(kind, file, tmp_path / "out.pth")
            assert code == 2, (kind, name)
            assert len(said.splitlines()) == 1, said
            assert name in said
    code, said = run("mar", tmp_path / "in", tmp_path / "out")
    assert code == 2
    assert "folder with one" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "whole.pth"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value, tensors, tmp_path, run):
    bad = {name: t.clone() for name, t in tensors.items()}
    bad["decoder_norm.bias"][3] = value
    code, said = run("mar", write(tmp_path / "a.pth", bad), tmp_path / "model", "--heads", 2)
    assert code == 2
    assert "decoder_norm.bias" in said
    assert not (tmp_path / "model").exists()
    model, config = official_model(write(tmp_path / "a.pth", tensors), Hints(heads=2))
    model.decoder_norm.bias[3] = value
    save_model(tmp_path / "ours", model, config)
    code, said = run("to-mar", tmp_path / "ours", tmp_path / "b.pth")
    assert code == 2
    assert "decoder_norm.bias" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "ours"]


@pytest.mark.parametrize(
    "args", [{"patch_size": 0}, {"vae_stride": "16"}, {"cfg": "much"}, {"cfg_schedule": 3}, {"proj_dropout": None}]
)
def test_recorded_args_that_cannot_be_are_refused_by_name(args, tensors, tmp_path):
    with pytest.raises(ValueError, match=r"a\.pth: its args say"):
        official_model(write(tmp_path / "a.pth", tensors, **args), Hints(heads=2))


def test_the_output_is_checked_before_the_checkpoint_is_read(tensors, tmp_path, run, monkeypatch):
    def read(*_):
        raise AssertionError("read")

    file = write(tmp_path / "a.pth", tensors)
    monkeypatch.setattr("marval.io.official.read_checkpoint", read)
    monkeypatch.setattr("marval.io.vae.read_checkpoint", read)
    (tmp_path / "taken").mkdir()
    for out in (tmp_path / "taken", file / "model"):
        for kind in ("mar", "vae"):
            code, said = run(kind, file, out, *(("--heads", 2) if kind == "mar" else ()))
            assert code == 2
            assert len(said.splitlines()) == 1


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
