"""Caches of latents: what they hold, that kills and damaged images lose nothing, and that training reads them."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from marval.config import Chain, LatentSpace, MARConfig, ModelConfig
from marval.data import LatentData, batch_indices, cache_latents, check_data, load_data
from marval.data.latents import PLAN
from marval.data.loader import Loader
from marval.io.checkpoint import load_model
from marval.io.images import centre_crop
from marval.io.official import imagenet_classes
from marval.io.text import ENCODER
from marval.io.vae import vae_hash, vae_place
from marval.model import MAR
from marval.pipeline import Pipeline
from marval.presets import TrainConfig
from marval.runtime.distributed import Workers
from marval.runtime.folder import open_run
from marval.runtime.philox import stream_keys
from marval.runtime.rng import generator
from marval.spaces import Latents, Pixels
from marval.train.teacher import latent_teacher_config, train_teacher
from texts import write_captioned
from tiny import tiny_config, tiny_data

COUNT = 13


class StandInVAE:
    """Stride 4, two latent channels: the mean is the pooled picture's two first channels, the deviation a tenth."""

    dtype = torch.float32

    def __init__(self):
        self.seen = 0  # images and mirrors; the black image that it is tried with does not count

    def encode(self, x):
        self.seen += len(x) if x.std() > 0 else 0
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
    """A cache in shards of four images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("marval.data.cache.SHARD", 4)
        patch.setattr("marval.data.cache.load_vae", lambda *_, **__: vae or StandInVAE())
        return cache_latents(pictures, "stand-in", out, **{"image_size": 16, "batch_size": 2} | options)


def space_of(data):
    return Latents(LatentSpace((16, 16), "stand-in", 4, 2, scale=data.scale), vae=torch.nn.Identity())


def stopped(rank=0, count=1):
    workers = Workers(rank, count)
    workers.stop.set()
    return workers


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
        moments = data.moments(i).float()
        for side, picture in enumerate((x, x.flip(2))):
            expected = torch.nn.functional.avg_pool2d(picture[None], 4)[0, :2]
            torch.testing.assert_close(moments[side, :2], expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(moments[:, 2:].exp().sqrt(), torch.full((2, 2, 4, 4), 0.1), rtol=1e-2, atol=1e-3)
    # Scaled posterior samples have standard deviation 1.
    everything, space = torch.arange(COUNT), space_of(data)
    keys = stream_keys((0, step, i) for step in range(50) for i in range(COUNT)).split(COUNT)
    tokens = torch.cat([data.tokens(data.read(everything, some), some, space) for some in keys])
    assert tokens.shape == (50 * COUNT, 16, 2)
    assert tokens.std().item() == pytest.approx(1, rel=0.03)
    assert cache(pictures, tmp_path / "cache", scale=0.2325).scale == 0.2325


def test_a_cache_without_mirrors_holds_and_reads_each_image_as_it_is(pictures, tmp_path, capsys):
    both, one = cache(pictures, tmp_path / "both"), cache(pictures, tmp_path / "one", mirrors=False)
    assert f"{COUNT} images in {tmp_path / 'one'}" in capsys.readouterr().out
    assert one.moments(3).shape == (1, 4, 4, 4)
    everything, keys = torch.arange(COUNT), torch.arange(COUNT)
    plain = torch.stack([both.moments(i, 0) for i in range(COUNT)])
    assert torch.equal(one.read(everything, keys), plain)
    assert not torch.equal(both.read(everything, keys), plain)
    with pytest.raises(ValueError, match="another mirrors"):
        cache(pictures, tmp_path / "one")


def test_a_cache_of_captioned_images_trains_a_model_of_text(tmp_path, encoder):
    root = write_captioned(tmp_path / "emoji")
    (root / "taxi-3d.png").write_bytes(b"damaged")
    cache(root, tmp_path / "cache")
    data, images = (load_data(spec, encoder=ENCODER) for spec in (f"latents:{tmp_path / 'cache'}", f"folder:{root}"))
    assert (data.class_names, data.labels.tolist()) == (("shark", "taxi", "apple"), [0, 0, 1, 2])
    assert data.captions.to_dict() == images.captions.to_dict()
    everything, keys = torch.arange(4), torch.arange(4)
    assert torch.equal(data.conditions(everything, keys), images.conditions(everything, keys))
    config = latent_teacher_config("fashion-mnist", "t", data, "latents:cache")
    assert (config.mar.encoder_dim, config.mar.token_grid, config.mar.token_dim) == (128, (4, 4), 2)  # the small one
    assert (config.mar.text_dim, config.styles, config.encoder) == (8, ("3d", "flat"), ENCODER)
    check_data(data, config)
    with pytest.raises(ValueError, match="expected images with such captions"):
        check_data(load_data(f"latents:{tmp_path / 'cache'}"), config)


@pytest.mark.parametrize("kind", ["latents", "pixels"])
def test_rows_of_a_batch_do_not_depend_on_how_it_is_split_and_read_ahead(kind, pictures, tmp_path):
    data, space = tiny_data(), Pixels(tiny_config().space)
    if kind == "latents":
        data = cache(pictures, tmp_path / "cache")
        space = space_of(data)

    def batches(workers, updates, accumulate=1):
        settings = TrainConfig(batch_size=5, seed=3, accumulate=accumulate)
        loader = Loader(data, settings, space, workers)
        return {update: list(loader(update)) for update in updates}

    whole = batches(Workers(), (0, 1, 2, 9))
    for update, ((rows, tokens, labels),) in whole.items():
        assert rows == slice(0, 5)
        assert torch.equal(labels, data.labels[batch_indices(len(data), 5, update, 3)])
        assert len(tokens) == 5
    first, second = batches(Workers(0, 2), (1, 2)), batches(Workers(1, 2), (9, 2), accumulate=2)
    parts = [*first[2], *second[2]]
    assert [rows for rows, *_ in parts] == [slice(0, 2), slice(2, 3), slice(3, 5)]
    assert torch.equal(whole[2][0][1], torch.cat([tokens for _, tokens, _ in parts]))
    assert torch.equal(whole[2][0][2], torch.cat([labels for *_, labels in parts]))
    assert not torch.equal(whole[1][0][1], whole[2][0][1])


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
    assert cache(pictures, out, Dies(), workers=stopped()) is None  # a run that is asked to stop goes on later, too
    vae = StandInVAE()
    data = cache(pictures, out, vae)
    assert vae.seen == 2 * (COUNT - 4)
    assert all((out / name).stat().st_mtime_ns == when for name, when in before.items())
    again = cache(pictures, tmp_path / "whole")
    assert torch.equal(data.labels, again.labels)
    assert all(torch.equal(data.moments(i), again.moments(i)) for i in range(COUNT))
    assert data.scale == again.scale


def test_workers_share_the_shards(pictures, tmp_path):
    """Two workers one after the other; files need no barrier."""
    out, vaes = tmp_path / "cache", (StandInVAE(), StandInVAE())
    assert cache(pictures, out, workers=stopped(0, 2)) is None  # the main one claims the folder
    with pytest.raises(ValueError, match="unfinished cache"):
        cache(pictures, out, vaes[1], workers=Workers(1, 2))
    assert len(cache(pictures, out, vaes[0], workers=Workers(0, 2))) == COUNT
    assert [vae.seen for vae in vaes] == [2 * 8, 2 * 5]


def test_damaged_images_are_listed_and_skipped_and_too_many_stop_the_run(pictures, tmp_path):
    for name in ("bad", "worse", "worst", "none"):
        (pictures / f"pear/{name}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"bad.png cannot be read .*: mend or remove it; then remove .*more than 1%"):
        cache(pictures, tmp_path / "cache")
    for name in ("worse", "worst", "none"):
        (pictures / f"pear/{name}.png").unlink()
    for i in range(100):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(pictures / f"pear/more-{i}.png")
    assert len(cache(pictures, tmp_path / "more")) == COUNT + 100
    index = json.loads((tmp_path / "more/index.json").read_text())
    assert len(index["damaged"]) == 1
    assert "pear/bad.png cannot be read" in index["damaged"][0]
    assert len(index["labels"]) == sum(index["counts"]) == COUNT + 100


def test_a_cache_of_something_else_is_not_mixed_up(pictures, tmp_path):
    cache(pictures, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"caches something else \(another image_size\): choose another folder"):
        cache(pictures, tmp_path / "cache", image_size=8)
    Image.new("RGB", (20, 24), "red").save(pictures / "pear/01.png")
    with pytest.raises(ValueError, match="another listing"):
        cache(pictures, tmp_path / "cache")
    with pytest.raises(ValueError, match="no cache"):
        load_data(f"latents:{tmp_path}")
    (tmp_path / "cache" / PLAN).unlink()
    with pytest.raises(ValueError, match="caches something else"):
        cache(pictures, tmp_path / "cache")


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file: expected a folder"):
        cache_latents(tmp_path / "no pictures", "no-vae", tmp_path / "file")


def vae_folder(folder, seed=0, **changes):
    """A real VAE of stride 4 and few weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    options = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
               "block_out_channels": [32, 32, 32], "latent_channels": 2}  # fmt: skip
    AutoencoderKL(**options | changes).save_pretrained(folder)
    return folder


@pytest.fixture
def command(pictures, marval):
    """Run the verb on the pictures; its exit code is given, and what it says on standard error."""

    def run(vae, *options, code=0):
        arguments = ["--images", pictures, "--vae", vae, "--image-size", 16, *options]
        return marval("cache", "latents", *arguments, code=code).err

    return run


def test_the_vae_is_known_by_its_weights_not_by_its_name(command, tmp_path):
    vae_folder(tmp_path / "vae")
    command("vae")
    data = LatentData.open(tmp_path / "latents")
    assert data.vae == str(tmp_path / "vae")  # good from any other folder
    assert data.vae_sha256 == vae_hash(str(tmp_path / "vae"))
    (tmp_path / "vae").rename(tmp_path / "moved")
    command("moved")
    vae_folder(tmp_path / "vae", seed=1)
    assert "caches something else (another vae_sha256): choose another folder" in command("vae", code=2)


def test_a_models_vae_of_other_weights_is_refused(tmp_path):
    folder = str(vae_folder(tmp_path / "vae"))
    config = LatentSpace((16, 16), vae_place(folder), 4, 2, vae_sha256=vae_hash(folder))
    assert Latents(config).vae.config.latent_channels == 2
    vae_folder(tmp_path / "vae", seed=1)
    latents = Latents(config)
    for _ in range(2):  # who asks again is not given it either
        with pytest.raises(ValueError, match="vae has other weights"):
            latents.vae  # noqa: B018
    assert vae_place("owner/a-hub-id") == "owner/a-hub-id"
    assert vae_hash("owner/a-hub-id") == ""


def test_a_typing_error_claims_nothing(command, pictures, tmp_path):
    vae_folder(tmp_path / "vae")
    assert "vea' is no folder here" in command(tmp_path / "vea", code=2)
    assert "--image-size 18: expected a multiple of the VAE's stride" in command("vae", "--image-size", 18, code=2)
    for flag, value in ("--image-size", 0), ("--batch-size", 0), ("--scale", 0), ("--scale", "nan"), ("--scale", "inf"):
        assert f"{flag} {value}" in command("vae", flag, value, code=2)
    assert not (tmp_path / "latents").exists()
    cache(pictures, tmp_path / "latents", workers=stopped())  # claimed, but no shard is written
    command("vae")
    assert len(LatentData.open(tmp_path / "latents")) == COUNT


def test_damage_to_a_finished_cache_is_named(pictures, tmp_path):
    data = cache(pictures, tmp_path / "cache")
    expected, shard = data.moments(9), tmp_path / "cache/shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is damaged .* remove it, and run marval cache"):
        data.moments(5)
    shard.unlink()
    assert torch.equal(cache(pictures, tmp_path / "cache").moments(9), expected)


def test_a_vae_of_numbers_that_are_not_finite_is_refused(pictures, tmp_path):
    class Broken(StandInVAE):
        def encode(self, x):
            posterior = super().encode(x)
            posterior.latent_dist.parameters += 1e6 if self.seen else 0
            return posterior

    with pytest.raises(ValueError, match="numbers that are not finite"):  # in half precision
        cache(pictures, tmp_path / "cache", Broken())
    assert not list((tmp_path / "cache").glob("shard*"))


def latent_config(data, **changes):
    space = LatentSpace((16, 16), data.vae, 4, 2, scale=data.scale, vae_sha256=data.vae_sha256)
    space = dataclasses.replace(space, **changes)
    mar = dataclasses.replace(tiny_config().mar, token_grid=space.token_grid, token_dim=space.token_dim)
    return ModelConfig(mar, space, Chain(diffusion_steps=8), data.class_names, 4, "latent", f"latents:{data.folder}")


def test_a_cache_must_fit_the_model(pictures, tmp_path):
    data = dataclasses.replace(cache(pictures, tmp_path / "cache"), vae="models/kl16", vae_sha256="a" * 64)
    check_data(data, latent_config(data))
    check_data(data, latent_config(data, vae="elsewhere", scale=data.scale * 1.0005))
    check_data(data, latent_config(data, vae="kl16", vae_sha256=""))  # converted by an earlier version
    other = dataclasses.replace(tiny_config(), class_names=data.class_names)
    for config, words in [
        (latent_config(data, vae_sha256="b" * 64), "the VAE models/kl16, the model's is models/kl16, of other"),
        (latent_config(data, vae="another", vae_sha256=""), "made with the VAE models/kl16, the model's is another"),
        (latent_config(data, scale=0.9), r"the model's is 0.9: run marval cache .* --scale 0.9 "),
        (latent_config(data, image_size=(32, 32)), r"latents are \(2, 4, 4\), the model's are \(2, 8, 8\)"),
        (other, "the model draws pixels"),
        (tiny_config(), "classes"),
    ]:
        with pytest.raises(ValueError, match=words):
            check_data(data, config)


def test_a_teacher_trains_on_a_cache(pictures, tmp_path):
    data = cache(pictures, tmp_path / "cache")
    settings = TrainConfig(updates=4, batch_size=4, tokens_per_image=6, warmup=1, log_every=1, autocast=False)
    with open_run(tmp_path / "run") as run:
        train_teacher(latent_config(data), settings, data, run)
    assert load_model(tmp_path / "run/model")[1] == latent_config(data)

    small = latent_teacher_config("fashion-mnist", "mine", data, "latents:x")
    largest = data.scale * max(data.moments(i)[:, :2].abs().max() for i in range(len(data)))
    assert largest <= small.space.limit <= largest + 0.1001
    early = Pipeline(MAR(small.mar).initialize(generator("early")), small)  # whose eps is far off at t = 999
    tokens = early.sample_tokens([0, 1], seeds=0, iterations=2)
    assert tokens.abs().max() <= 1.5 * small.space.limit

    large = dataclasses.replace(data, shape=(16, 16, 16), image_size=256, class_names=tuple(imagenet_classes()))
    config = latent_teacher_config("imagenet256-large", "mine", large, "latents:x")
    assert config.mar == MARConfig.imagenet256("large")
    assert (config.space.vae_stride, config.space.latent_channels, config.space.scale) == (16, 16, data.scale)
    assert (config.draw.clip, small.draw.clip) == (False, True)  # MAR's own chain has no clip
    assert latent_teacher_config("fashion-mnist", "mine", large, "").mar == MARConfig.fashion((16, 16), 16, 1000)
