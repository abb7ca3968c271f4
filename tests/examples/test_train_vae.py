"""An autoencoder of one's own: it learns, goes on after a stop, and gives latents that marval takes as they are."""

import importlib.util
import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from marval.cli.options import read
from marval.config import LatentSpace
from marval.data import LatentData, load_images
from marval.runtime.rng import generator
from marval.spaces import Latents
from texts import write_captioned

SCRIPT = Path(__file__).parents[2] / "examples/train_vae.py"
SMALL = [
    "--size",
    "16",
    "--channels",
    "2",
    "--width",
    "8",
    "--batch-size",
    "8",
    "--learning-rate",
    "0.01",
    "--device",
    "cpu",
]


@pytest.fixture
def pictures(tmp_path):
    """Two classes of pictures that few numbers describe: an upper and a lower half, each of one colour."""
    rng = np.random.default_rng(0)
    for i in range(40):
        folder = tmp_path / "pictures" / ("dark", "bright")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        halves = rng.integers(0, 128, (2, 1, 3), dtype=np.uint8) + 127 * np.uint8(i % 2)
        Image.fromarray(np.repeat(np.repeat(halves, 8, axis=0), 16, axis=1)).save(folder / f"{i:02d}.png")
    return tmp_path / "pictures"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("train_vae", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_vae", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def train(script, pictures):
    """Run the script on the pictures, and return its folder."""

    def run(name, *words):
        out = pictures.parent / name
        read(script.train_vae, list(map(str, [f"folder:{pictures}", out, *SMALL, *words])), "train_vae.py")()
        return out

    return run


def test_marval_takes_what_it_learned_as_it_is(train, pictures, marval):
    out = train("vae", "--updates", 200)
    report = json.loads((out / "report.json").read_text())
    assert report["psnr_held_out"] > 14  # of pictures of their mean: 11
    assert {file.name for file in out.iterdir()} == {
        "config.json", "diffusion_pytorch_model.safetensors", "report.json", "reconstructions.png",
    }  # fmt: skip
    marval("cache", "cache", "--images", pictures, "--vae", out, "--image-size", 16)
    data = LatentData.open(pictures.parent / "cache")
    assert data.shape == (2, 4, 4)
    assert data.scale == pytest.approx(1, abs=0.1)
    space = LatentSpace((16, 16), str(out), 4, 2, scale=data.scale, vae_sha256=data.vae_sha256)
    images = load_images(f"folder:{pictures}").images
    held_out = images[torch.randperm(40, generator=generator(0, "held out"))[:4]] / 255
    error = (Latents(space).decode(Latents(space).encode(held_out)) - held_out).square().mean()
    assert -10 * error.log10() == pytest.approx(report["psnr_held_out"], abs=0.01)


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(train, script, monkeypatch, capsys):
    whole, calls, augment = train("whole", "--updates", 4), [], script.augment

    def stop_at_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return augment(*arguments)

    monkeypatch.setattr(script, "augment", stop_at_the_third)
    train("stopped", "--updates", 4)
    assert len(calls) == 3
    assert "stopped; the same command with --resume goes on" in capsys.readouterr().out
    stopped = train("stopped", "--updates", 4, "--resume")
    assert len(calls) == 4
    weights = [load_file(out / "diffusion_pytorch_model.safetensors") for out in (whole, stopped)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_latents_of_mean_0_and_deviation_1_give_the_same_pictures(script):
    settings = script.Settings(size=16, channels=3, width=8)
    vae = script.make_vae(settings).requires_grad_(False)
    images = torch.randint(0, 256, (20, 3, 16, 16), generator=generator("images"), dtype=torch.uint8)
    before = script.decode(vae, script.encode(vae, images))
    variance = vae.encode(images / 127.5 - 1).latent_dist.var
    std = script.standardise(vae, images)
    latents = script.encode(vae, images)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(script.decode(vae, latents), before, atol=1e-4, rtol=0)
    scaled = variance / std.float()[:, None, None] ** 2
    torch.testing.assert_close(vae.encode(images / 127.5 - 1).latent_dist.var, scaled, atol=0, rtol=1e-3)


def test_captioned_images_are_read_by_their_splits(train, pictures, tmp_path):
    write_captioned(tmp_path / "captioned")
    captioned = train("of-captions", "--updates", 1, "--held-out", f"folder:{tmp_path / 'captioned'}@held-out")
    assert json.loads((captioned / "report.json").read_text())["held_out"] == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--stride", 3], "stride 3: expected a power of 2 that divides --size 16"),
        (["--width", 12], "width 12: expected a multiple of 8"),
        (["--batch-size", 0], "--batch-size 0: expected a whole number from 1"),
        (["--resume"], "nothing to resume"),
    ],
)
def test_settings_are_refused_before_anything_is_made(train, pictures, words, said):
    with pytest.raises(ValueError, match=said):
        train("refused", *words)
    assert not (pictures.parent / "refused").exists()


def test_a_finished_autoencoder_is_not_written_over(train):
    train("vae", "--updates", 1)
    with pytest.raises(ValueError, match="holds an autoencoder already"):
        train("vae", "--updates", 1)
