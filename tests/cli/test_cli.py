"""The command line: what it makes, and one clear line with exit code 2 for bad input."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from marval.cli import VERBS
from marval.cli.options import options_of, read
from marval.cli.training import train
from marval.config import MARConfig
from marval.presets import TrainConfig


def test_the_installed_command_says_what_there_is_without_torch(work):
    (work / "sitecustomize.py").write_text("import sys; sys.modules['torch'] = None")
    path = os.pathsep.join([str(work), os.environ.get("PYTHONPATH", "")])
    for arguments in (["--help"], []):
        command = [Path(sys.executable).parent / "marval", *arguments]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if arguments:
            assert all(f"\n  {verb} " in done.stdout for verb in VERBS)
            assert max(map(len, done.stdout.splitlines())) <= 105
    (work / "sitecustomize.py").unlink()


def test_marval_alone_lists_the_models_that_are_there(marval, work, tmp_path):
    for name, target in (("mine", work / "tiny"), ("broken", work / "pictures")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "model").symlink_to(target)
    lines = marval().out.splitlines()[3:10]
    names = [f"{kind}-{role}" for kind in ("emoji", "fashion") for role in ("teacher", "student", "tuned")]
    names.append("runs/mine")
    assert [line.split()[0] for line in lines] == names
    assert lines[0].split()[1:] == ["chain", "16", "32x32"]


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_groups_metavars_and_two_commands(verb, marval, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = marval(*verb.split(), "--help").out
    assert out.count("\n  marval ") + out.count("\n  torchrun ") == 2
    assert max(map(len, out.splitlines())) <= 120
    assert all(option.help for option in options_of(VERBS[verb]))
    assert "None" not in out


def test_a_preset_gives_the_defaults_and_what_is_typed_lies_over_them():
    verb = read(
        train, ["--preset", "imagenet256-base", "--updates", "700000", "--no-checkpoint-blocks"], "marval train"
    )
    preset = TrainConfig.imagenet256("base")
    assert preset.checkpoint_blocks
    assert verb.keywords["settings"] == dataclasses.replace(preset, updates=700_000, checkpoint_blocks=False)


def test_sample_writes_pictures_and_a_grid(marval, work, tmp_path):
    for out in ("first", "second"):
        marval("sample", work / "tiny", "--classes", "square,cross", "--count", 5, "--iterations", 3, "--seed", 7,
               "--out", out)  # fmt: skip
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    expected = ["square-7", "cross-8", "square-9", "cross-10", "square-11"]
    assert names == [*(f"{i:05d}-{name}.png" for i, name in enumerate(expected)), "grid.png"]
    assert Image.open(tmp_path / "first" / names[0]).size == (8, 8)
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


REFUSALS = [  # what is typed, and what the line must say
    ("sampel tiny", "unknown verb 'sampel': did you mean sample?"),
    ("sample fashion-studnt", "no model 'fashion-studnt'"),
    ("sample tiny --classs 1", "unknown argument --classs: did you mean --classes?"),
    ("sample tiny --classes sqare", "unknown class 'sqare'|'square'"),
    ("sample tiny --iterations 17", "17|1 to 16"),
    ("sample tiny --iterations few", "--iterations 'few': expected a whole number"),
    ("sample tiny --count 0", "--count 0: expected a whole number from 1"),
    ("sample tiny --diffusion-steps 1", "--diffusion-steps 1: expected|2 to 1000"),
    ("sample tiny --device nonsense", "--device nonsense: not here"),
    ("sample", "name a model"),
    ("distill", "the following arguments are required: TEACHER"),
    ("distill tiny --data nowhere", "unknown data 'nowhere'"),
    ("distill tiny --data folder:pictures", "classes|apple"),
    ("train --data folder:damaged", "broken.png|mend or remove"),
    ("train --preset imagenet256", "--preset 'imagenet256': expected fashion-mnist or imagenet256-base"),
    ("train --preset imagenet256-base", "trains on latents|marval cache"),
    ("tune fashion-student --reward pixscore", "pixscore|pickscore|file.py:function"),
    ("evaluate", "name at least one model"),
    ("evaluate tiny --samples 0 --batches", "nothing to measure"),
    ("evaluate imagenet256-base", "random weights|--samples 0"),
    ("compare here.json there.json", "here.json is not there"),
    ("convert marr a b", "invalid choice: 'marr'"),
    ("cache there", "--images DIR"),
    ("sample truncated", "truncated|damaged"),
    ("sample foreign.safetensors", "no model of marval"),
    ("sample nothing", "does not exist"),
]


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory, work):
    """A folder with a tiny model and pictures, and with what cannot be used."""
    from safetensors.numpy import save_file

    root = tmp_path_factory.mktemp("bad")
    for name in ("tiny", "pictures"):
        (root / name).symlink_to(work / name)
    whole = (work / "tiny/model.safetensors").read_bytes()
    (root / "truncated").mkdir()
    (root / "truncated/model.safetensors").write_bytes(whole[: len(whole) // 2])
    save_file({"weight": np.zeros(3, np.float32)}, root / "foreign.safetensors")
    (root / "nothing").mkdir()
    (root / "damaged/a").mkdir(parents=True)
    (root / "damaged/a/broken.png").write_bytes(b"not a picture")
    return root


@pytest.mark.parametrize(("typed", "told"), REFUSALS, ids=[typed for typed, _ in REFUSALS])
def test_bad_input_is_refused_in_one_line_and_nothing_is_made(typed, told, refusal, bad_files, unchecked, monkeypatch):
    monkeypatch.chdir(bad_files)
    before = sorted(path for path in bad_files.rglob("*") if "cache" not in path.parts)
    said = refusal(*typed.split())
    assert all(word in said for word in told.split("|")), said
    assert sorted(path for path in bad_files.rglob("*") if "cache" not in path.parts) == before


def test_evaluate_times_full_size_models_with_random_weights(marval, monkeypatch, tmp_path):
    monkeypatch.setattr(MARConfig, "imagenet256", lambda size: MARConfig((4, 4), 16, 3, 16, 1, 2, 16, 1, 2, 16, 1))
    marval("evaluate", "imagenet256-base", "--samples", 0, "--iterations", 2, "--diffusion-steps", 2, "--batches", 1,
           "--repeats", 1, "--out", "full.json")  # fmt: skip
    text = (tmp_path / "full.json").read_text()
    assert json.loads(text)
    assert "imagenet256-base-teacher" in text
    assert "imagenet256-base-student" in text
