"""Caches of latents: what they hold, that kills and corrupt images lose nothing, and that training reads them."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from marval.config import Chain, LatentSpace, MARConfig, ModelConfig
from marval.data import LatentData, cache_latents, check_data, load_data, load_folder
from marval.data.imagenet import imagenet_classes
from marval.data.latents import centre_crop, read_square
from marval.io.checkpoint import load_model
from marval.io.vae import vae_hash, vae_place
from marval.presets import TrainConfig
from marval.runtime.distributed import Workers
from marval.runtime.folder import open_run
from marval.spaces import Latents
from marval.train.teacher import latent_teacher_config, train_teacher
from tiny import tiny_config

COUNT = 13


class StandInVAE:
    """Stride 4, two latent channels: the mean is the pooled picture's two first channels, the deviation a tenth."""

    dtype = torch.float32

    def __init__(self):
        self.seen = 0

    def encode(self, x):
        self.seen += len(x) if len(x) > 1 else 0  # not the grey image that it is tried with
        mean = torch.nn.functional.avg_pool2d(x, 4)[:, :2]
        parameters = torch.cat([mean, torch.full_like(mean, 2 * np.log(0.1))], dim=1)
        return SimpleNamespace(latent_dist=SimpleNamespace(parameters=parameters, mean=mean))


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        folder = tmp_path / "pictures" / ("n02012849", "pear")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20 + i, 24, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return tmp_path / "pictures"


def cache(pictures, out, vae=None, **options):
    vae = vae or StandInVAE()
    return cache_latents(
        pictures, "stand-in", out, **{"image_size": 16, "batch_size": 2, "shard_size": 4, "load_vae": lambda: vae}
        | {"report": lambda line: None} | options,
    )  # fmt: skip


def space_of(data):
    return Latents(LatentSpace((16, 16), "stand-in", 4, 2, scale=data.scale), vae=torch.nn.Identity())


def test_a_cache_holds_the_moments_of_every_image_and_its_mirror(pictures, tmp_path):
    data = cache(pictures, tmp_path / "cache")
    assert len(data) == COUNT
    assert data.class_names == ("crane bird", "pear")
    assert data.labels.tolist() == [0] * 7 + [1] * 6
    assert data.shape == (2, 4, 4)
    files = sorted(pictures.rglob("*.png"))
    for i in (0, 5, 12):
        with Image.open(files[i]) as image:
            x = torch.from_numpy(np.array(centre_crop(image, 16))).permute(2, 0, 1).float() / 127.5 - 1
        found = data.moments(i).float()
        for side, picture in enumerate((x, x.flip(2))):
            expected = torch.nn.functional.avg_pool2d(picture[None], 4)[0, :2]
            torch.testing.assert_close(found[side, :2], expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found[:, 2:].exp().sqrt(), torch.full((2, 2, 4, 4), 0.1), rtol=1e-2, atol=1e-3)
    # Scaled posterior samples have standard deviation 1.
    tokens = torch.cat(
        [data.tokens(torch.arange(COUNT), slice(0, COUNT), space_of(data), torch.device("cpu"), (0, step))[0]
         for step in range(50)]
    )  # fmt: skip
    assert tokens.shape == (50 * COUNT, 16, 2)
    assert tokens.std().item() == pytest.approx(1, rel=0.03)
    fixed = cache(pictures, tmp_path / "fixed", scale=0.2325)
    assert fixed.scale == 0.2325


def test_rows_of_a_batch_do_not_depend_on_how_it_is_split(pictures, tmp_path):
    data = cache(pictures, tmp_path / "cache")
    space, device, indices = space_of(data), torch.device("cpu"), torch.tensor([3, 3, 12, 0, 7])
    whole, labels = data.tokens(indices, slice(0, 5), space, device, ("s", 1))
    parts = [data.tokens(indices, rows, space, device, ("s", 1)) for rows in (slice(0, 2), slice(2, 5))]
    assert torch.equal(whole, torch.cat([part for part, _ in parts]))
    assert torch.equal(labels, torch.cat([part for _, part in parts]))
    assert not torch.equal(whole[0], whole[1])  # the same image twice: other noise
    assert not torch.equal(whole, data.tokens(indices, slice(0, 5), space, device, ("s", 2))[0])


def test_a_run_that_was_cut_short_goes_on_without_redoing_shards(pictures, tmp_path):
    class Dies(StandInVAE):
        def encode(self, x):
            if self.seen > 10:
                raise KeyboardInterrupt
            return super().encode(x)

    out = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        cache(pictures, out, Dies())
    with pytest.raises(ValueError, match="unfinished"):
        load_data(f"latents:{out}")
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*")}
    assert list(before) == ["shard-00000.safetensors"]
    vae = StandInVAE()
    data = cache(pictures, out, vae)
    assert vae.seen == 2 * (COUNT - 4)
    assert all((out / name).stat().st_mtime_ns == when for name, when in before.items())
    again = cache(pictures, tmp_path / "whole")
    assert torch.equal(data.labels, again.labels)
    assert all(torch.equal(data.moments(i), again.moments(i)) for i in range(COUNT))
    assert data.scale == again.scale


def test_a_run_that_is_asked_to_stop_says_so_and_goes_on_later(pictures, tmp_path):
    workers, vae = Workers(), StandInVAE()
    workers.stop.set()
    assert cache(pictures, tmp_path / "cache", vae, workers=workers) is None
    assert vae.seen == 0
    assert len(cache(pictures, tmp_path / "cache", vae)) == COUNT


def test_workers_share_the_shards(pictures, tmp_path):
    """Two workers one after the other; the barrier is not needed for files."""
    out = tmp_path / "cache"
    vaes = StandInVAE(), StandInVAE()
    for rank in (1, 0):
        workers = Workers(rank, 2)
        if rank == 1:
            main = Workers(0, 2)
            main.stop.set()
            assert cache(pictures, out, workers=main) is None  # it claims the folder
            with pytest.raises(ValueError, match="unfinished cache"):
                cache(pictures, out, vaes[rank], workers=workers)
        else:
            data = cache(pictures, out, vaes[rank], workers=workers)
    assert [vae.seen for vae in vaes] == [2 * 8, 2 * 5]
    assert len(data) == COUNT


def test_corrupt_images_are_listed_and_skipped_and_too_many_stop_the_run(pictures, tmp_path):
    (pictures / "pear/bad.png").write_bytes(b"not a picture")
    for name in ("worse", "worst", "none"):
        (pictures / f"pear/{name}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"bad.png cannot be read .*: mend or remove it; then remove .*more than 1%"):
        cache(pictures, tmp_path / "cache")
    for name in ("worse", "worst", "none"):
        (pictures / f"pear/{name}.png").unlink()
    for i in range(100):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(pictures / f"pear/more-{i}.png")
    data = cache(pictures, tmp_path / "more")
    assert len(data) == COUNT + 100
    index = json.loads((tmp_path / "more/index.json").read_text())
    assert len(index["corrupt"]) == 1
    assert "pear/bad.png cannot be read" in index["corrupt"][0]
    assert len(index["labels"]) == sum(index["counts"]) == COUNT + 100


def test_a_cache_of_something_else_is_not_mixed_up(pictures, tmp_path):
    cache(pictures, tmp_path / "cache")
    with pytest.raises(ValueError, match="image_size was 16, now 8"):
        cache(pictures, tmp_path / "cache", image_size=8)
    Image.new("RGB", (16, 16)).save(pictures / "pear/new.png")
    with pytest.raises(ValueError, match="images was 13, now 14"):
        cache(pictures, tmp_path / "cache")
    with pytest.raises(ValueError, match="no cache"):
        load_data(f"latents:{tmp_path}")


def vae_folder(folder, seed=0, **changes):
    """A real VAE of stride 4 and few weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    options = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
               "block_out_channels": [32, 32, 32], "latent_channels": 2}  # fmt: skip
    AutoencoderKL(**options | changes).save_pretrained(folder)
    return folder


def command(pictures, vae, *options, monkeypatch, cwd):
    from marval.cli import main

    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["marval", "cache-latents", "cache", "--images", str(pictures), "--vae", str(vae),
                                      "--image-size", "16", *options])  # fmt: skip
    main()


def refused(capsys, *arguments, **options):
    with pytest.raises(SystemExit) as ended:
        command(*arguments, **options)
    assert ended.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]  # diffusers may say more before


def test_other_weights_under_the_same_name_are_refused_and_the_same_under_another_are_not(
    pictures, tmp_path, monkeypatch, capsys
):
    here = {"monkeypatch": monkeypatch, "cwd": tmp_path}
    vae_folder(tmp_path / "vae")
    command(pictures, "vae", **here)
    data = LatentData.open(tmp_path / "cache")
    assert data.vae == str(tmp_path / "vae")  # good from any other folder
    weights = (tmp_path / "vae/diffusion_pytorch_model.safetensors").read_bytes()
    assert data.vae_sha256 == vae_hash(str(tmp_path / "vae"))
    (tmp_path / "vae").rename(tmp_path / "moved")
    command(pictures, "moved", **here)
    vae_folder(tmp_path / "vae", seed=1)
    assert "caches something else (a VAE of other weights): choose another folder" in refused(
        capsys, pictures, "vae", **here
    )
    (tmp_path / "vae/diffusion_pytorch_model.safetensors").write_bytes(weights)
    command(pictures, "vae", **here)


def test_a_models_vae_is_found_where_it_was_moved_to_and_known_by_its_weights(tmp_path, monkeypatch):
    folder = str(vae_folder(tmp_path / "a/vae"))
    config = LatentSpace((16, 16), vae_place(folder), 4, 2, vae_sha256=vae_hash(folder))
    monkeypatch.chdir(tmp_path / "a")
    assert vae_place("vae") == folder
    (tmp_path / "b").mkdir()
    (tmp_path / "a/vae").rename(tmp_path / "b/vae")
    monkeypatch.chdir(tmp_path / "b")
    assert Latents(config).vae.config.latent_channels == 2
    vae_folder(tmp_path / "b/vae", seed=1)
    with pytest.raises(ValueError, match="the VAE vae has other weights"):
        Latents(config).vae  # noqa: B018
    assert vae_place("owner/a-hub-id") == "owner/a-hub-id"
    assert vae_hash("owner/a-hub-id") == vae_hash(str(tmp_path / "nothing")) == ""


def test_changed_pictures_under_the_same_names_are_refused(pictures, tmp_path):
    cache(pictures, tmp_path / "cache")
    first = pictures / "pear/01.png"
    status = first.stat()
    first.write_bytes(first.read_bytes())
    os.utime(first, ns=(status.st_atime_ns, status.st_mtime_ns))
    cache(pictures, tmp_path / "cache")  # the same size and time
    Image.new("RGB", (20, 24), "red").save(first)
    with pytest.raises(ValueError, match=r"caches something else \(other pictures, or changed ones\)"):
        cache(pictures, tmp_path / "cache")


def test_a_typing_error_claims_nothing(pictures, tmp_path, monkeypatch, capsys):
    here = {"monkeypatch": monkeypatch, "cwd": tmp_path}
    vae_folder(tmp_path / "vae")
    assert "vea' is no folder here" in refused(capsys, pictures, tmp_path / "vea", **here)
    assert not (tmp_path / "cache").exists()
    said = refused(capsys, pictures, "vae", "--image-size", "18", **here)
    assert "--image-size 18: expected a multiple of the VAE's stride of 4 pixels" in said
    assert "--image-size 0" in refused(capsys, pictures, "vae", "--image-size", "0", **here)
    for scale in ("0", "nan", "-1", "inf"):
        assert f"--scale {scale if scale in ('nan', 'inf') else float(scale)}" in refused(
            capsys, pictures, "vae", "--scale", scale, **here
        )
    assert not (tmp_path / "cache").exists()
    cache(pictures, tmp_path / "cache", workers=stopped())  # claimed, but no shard is written
    command(pictures, "vae", **here)
    assert len(LatentData.open(tmp_path / "cache")) == COUNT


def test_damage_to_a_finished_cache_is_named(pictures, tmp_path):
    data = cache(pictures, tmp_path / "cache")
    shard = tmp_path / "cache/shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is damaged .* remove it, and run marval cache-la"):
        data.moments(5)
    shard.unlink()
    assert torch.equal(cache(pictures, tmp_path / "cache").moments(5), cache(pictures, tmp_path / "new").moments(5))
    (tmp_path / "cache/index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index.json is damaged"):
        LatentData.open(tmp_path / "cache")


def stopped():
    workers = Workers()
    workers.stop.set()
    return workers


def test_a_vae_of_numbers_that_are_not_finite_is_refused(pictures, tmp_path):
    class Broken(StandInVAE):
        def encode(self, x):
            found = super().encode(x)
            found.latent_dist.parameters = found.latent_dist.parameters + (1e6 if len(x) > 1 else 0)
            return found

    with pytest.raises(ValueError, match="numbers that are not finite"):  # in half precision
        cache(pictures, tmp_path / "cache", Broken())
    assert not list((tmp_path / "cache").glob("shard*"))


def test_a_cache_of_another_vae_or_scale_does_not_fit_a_model(pictures, tmp_path):
    data = dataclasses.replace(cache(pictures, tmp_path / "cache"), vae="models/kl16", vae_sha256="a" * 64)
    space = LatentSpace((16, 16), data.vae, 4, 2, scale=data.scale, vae_sha256=data.vae_sha256)
    mar = dataclasses.replace(tiny_config().mar, token_grid=space.token_grid, token_dim=space.token_dim)
    config = ModelConfig(mar, space, Chain(), data.class_names, 4, "latent")

    def with_space(**changes):
        return dataclasses.replace(config, space=dataclasses.replace(space, **changes))

    check_data(data, config)
    check_data(data, with_space(vae="elsewhere", scale=space.scale * 1.0005))
    check_data(data, with_space(vae="kl16", vae_sha256=""))  # converted by an earlier version
    with pytest.raises(ValueError, match="was made with the VAE models/kl16, the model's is models/kl16, of other"):
        check_data(data, with_space(vae_sha256="b" * 64))
    with pytest.raises(ValueError, match="made with the VAE models/kl16, the model's is another"):
        check_data(data, with_space(vae="another", vae_sha256=""))
    with pytest.raises(ValueError, match=r"the model's is 0.9: run marval cache-latents .* --scale 0.9 "):
        check_data(data, with_space(scale=0.9))


def test_pictures_are_read_upright_and_over_white(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    array = np.zeros((16, 16, 3), np.uint8)
    array[:8] = 255
    (tmp_path / "a").mkdir()
    Image.fromarray(array).save(tmp_path / "a/0.png", exif=exif)
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / "a/1.png")
    turned, white = (read_square((str(tmp_path / f"a/{i}.png"), 0), 16) for i in (0, 1))
    assert turned[:, :8].max() == 0
    assert turned[:, 8:].min() == 255
    assert white.min() == 255


def test_a_teacher_trains_on_a_cache(pictures, tmp_path):
    data = cache(pictures, tmp_path / "cache")
    space = LatentSpace((16, 16), "stand-in", 4, 2, scale=data.scale)
    mar = dataclasses.replace(tiny_config().mar, token_grid=space.token_grid, token_dim=space.token_dim)
    config = ModelConfig(
        mar,
        space,
        dataclasses.replace(tiny_config().draw, clip=False),
        data.class_names,
        4,
        "latent",
        f"latents:{data.folder}",
    )
    check_data(data, config)
    settings = TrainConfig(updates=4, batch_size=4, tokens_per_image=6, warmup=1, log_every=1, autocast=False)
    with open_run(tmp_path / "run") as run:
        train_teacher(config, settings, data, run)
    assert load_model(tmp_path / "run/model")[1] == config
    with pytest.raises(ValueError, match=r"latents are \(2, 4, 4\), the model's are \(2, 8, 8\)"):
        check_data(data, dataclasses.replace(config, space=dataclasses.replace(space, image_size=(32, 32))))
    with pytest.raises(ValueError, match="the model draws pixels"):
        check_data(data, dataclasses.replace(tiny_config(), class_names=data.class_names))


def test_full_size_teachers_take_their_sizes_from_the_cache(pictures, tmp_path):
    data = dataclasses.replace(
        cache(pictures, tmp_path / "cache"), shape=(16, 16, 16), image_size=256, class_names=tuple(imagenet_classes())
    )
    config = latent_teacher_config("imagenet256-large", "mine", data, "latents:x")
    assert config.mar == MARConfig.imagenet256("large")
    assert (config.space.vae_stride, config.space.latent_channels, config.space.scale) == (16, 16, data.scale)
    with pytest.raises(ValueError, match="imagenet256-base"):
        latent_teacher_config("fashion-mnist", "mine", data, "latents:x")


def test_imagenet_has_a_thousand_names_of_its_own(pictures):
    names = imagenet_classes()
    assert len(names) == len(set(names.values())) == 1000
    assert list(names) == sorted(names)
    assert [list(names.values())[i] for i in (0, 207, 281, 999)] == [
        "tench",
        "golden retriever",
        "tabby",
        "toilet tissue",
    ]
    assert load_folder(pictures).class_names == ("crane bird", "pear")


def test_centre_crop_takes_the_middle_and_keeps_proportions():
    """A disc in the middle of a wide picture stays a disc in the middle, at any scale; a small picture grows."""
    for width, height in ((400, 300), (90, 33), (17, 16), (12, 9)):
        y, x = np.mgrid[:height, :width]
        inside = (y + 0.5 - height / 2) ** 2 + (x + 0.5 - width / 2) ** 2 < (0.35 * height) ** 2
        found = np.asarray(centre_crop(Image.fromarray((inside * 255).astype(np.uint8)), 16)) / 255
        assert found.shape == (16, 16)
        assert found.sum() == pytest.approx(np.pi * (0.35 * 16) ** 2, rel=0.12)
        places = np.arange(16) + 0.5
        for share in (found.sum(axis=0), found.sum(axis=1)):
            assert share @ places / share.sum() == pytest.approx(8, abs=0.6)  # an odd side cannot be halved
            assert ((places - 8) ** 2 @ share / share.sum()) ** 0.5 == pytest.approx(0.35 * 16 / 2, rel=0.1)


def test_the_command_survives_kills(pictures, tmp_path):
    vae_folder(tmp_path / "vae")
    command = [
        sys.executable, "-m", "marval", "cache-latents", "cache", "--images", str(pictures), "--vae", "vae",
        "--image-size", "16",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    while not (tmp_path / "cache/plan.json").is_file() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.Random(0).random())
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"{COUNT} images" in done.stdout
    data = LatentData.open(tmp_path / "cache")
    assert data.shape == (2, 4, 4)
    assert load_file(tmp_path / "cache/shard-00000.safetensors")["moments"].shape == (COUNT, 2, 4, 4, 4)
