"""VAEs: the official KL autoencoder converted computes the same; what a model names as its VAE does no harm."""

import dataclasses
import json
import pickle
import shutil
import socket
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from marval.config import LatentSpace
from marval.data import LatentData
from marval.io.checkpoint import load_model, save_model
from marval.io.vae import convert_vae, diffusers_tensors, infer_vae_config, load_vae, vae_hash
from marval.pipeline import load
from marval.runtime.rng import generator
from tiny import tiny_config, tiny_model

BLOCKS = 2  # a level in the encoder; one more in the decoder


class Reference:
    """The autoencoder's equations; its weights, in latent-diffusion's format, are drawn when they are first used.

    As in KL-16 there is attention in the middle and in the encoder's last level.
    """

    def __init__(self, widths=(32, 64), latent=4):
        self.widths, self.latent, self.weights, self.rng = widths, latent, {}, generator("ldm")

    def weight(self, name, shape, like, mean=0.0):
        if name not in self.weights:
            drawn = torch.empty(shape, device="meta") if like.is_meta else torch.randn(shape, generator=self.rng)
            self.weights[name] = mean + 0.1 * drawn
        return self.weights[name]

    def conv(self, name, x, outputs, size=3, **options):
        weight = self.weight(f"{name}.weight", (outputs, x.shape[1], size, size), x)
        return F.conv2d(x, weight, self.weight(f"{name}.bias", (outputs,), x), **options)

    def norm(self, name, x):
        weights = (
            self.weight(f"{name}.{end}", x.shape[1:2], x, mean) for end, mean in (("weight", 1.0), ("bias", 0.0))
        )
        return F.group_norm(x, 32, *weights, eps=1e-6)

    def residual(self, name, x, outputs):
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), outputs, padding=1)
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), outputs, padding=1)
        return h + (x if x.shape[1] == outputs else self.conv(f"{name}.nin_shortcut", x, outputs, 1))

    def attention(self, name, x):
        width, h = x.shape[1], self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h, width, 1).flatten(2) for part in "qkv")
        share = (q.transpose(1, 2) @ k / width**0.5).softmax(dim=2)
        return x + self.conv(f"{name}.proj_out", (v @ share.transpose(1, 2)).unflatten(2, x.shape[2:]), width, 1)

    def middle(self, side, x):
        x = self.attention(f"{side}.mid.attn_1", self.residual(f"{side}.mid.block_1", x, x.shape[1]))
        return self.residual(f"{side}.mid.block_2", x, x.shape[1])

    def encode(self, x):
        """Mean and log-variance."""
        last = len(self.widths) - 1
        h = self.conv("encoder.conv_in", x, self.widths[0], padding=1)
        for level, width in enumerate(self.widths):
            for block in range(BLOCKS):
                h = self.residual(f"encoder.down.{level}.block.{block}", h, width)
                h = self.attention(f"encoder.down.{level}.attn.{block}", h) if level == last else h
            if level < last:
                h = self.conv(f"encoder.down.{level}.downsample.conv", F.pad(h, (0, 1, 0, 1)), width, stride=2)
        h = F.silu(self.norm("encoder.norm_out", self.middle("encoder", h)))
        h = self.conv("encoder.conv_out", h, 2 * self.latent, padding=1)
        return self.conv("quant_conv", h, 2 * self.latent, 1).chunk(2, dim=1)

    def decode(self, z):
        h = self.conv("post_quant_conv", z, self.latent, 1)
        h = self.middle("decoder", self.conv("decoder.conv_in", h, self.widths[-1], padding=1))
        for level, width in reversed(list(enumerate(self.widths))):
            for block in range(BLOCKS + 1):
                h = self.residual(f"decoder.up.{level}.block.{block}", h, width)
            if level > 0:
                h = self.conv(f"decoder.up.{level}.upsample.conv", F.interpolate(h, scale_factor=2.0), width, padding=1)
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", h)), 3, padding=1)

    def run(self, device="cpu"):
        """Encode and decode something, so that all weights are there."""
        rng = generator("picture")
        side = 2 ** (len(self.widths) - 1)
        x, z = torch.randn(2, 3, 8 * side, 8 * side, generator=rng), torch.randn(2, self.latent, 8, 8, generator=rng)
        return x, z, self.encode(x.to(device)), self.decode(z.to(device))


@pytest.fixture
def weights():
    reference = Reference()
    reference.run()
    return reference.weights


def test_the_converted_autoencoder_computes_the_same(tmp_path):
    from diffusers import AutoencoderKL

    reference = Reference()
    x, z, encoded, decoded = reference.run()
    torch.save({"model": {**reference.weights, "loss.logvar": torch.zeros(())}}, tmp_path / "kl16.ckpt")
    convert_vae(tmp_path / "kl16.ckpt", tmp_path / "vae")
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    with torch.no_grad():
        posterior = vae.encode(x).latent_dist
        for ours, expected in zip((posterior.mean, posterior.logvar), encoded, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(vae.decode(z).sample, decoded, rtol=1e-4, atol=1e-4)
    assert len(json.loads((tmp_path / "vae/source.json").read_text())["sha256"]) == 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kl16.ckpt", "vae"]
    with pytest.raises(ValueError, match=r"exists already.*--force"):
        convert_vae(tmp_path / "kl16.ckpt", tmp_path / "vae")
    with pytest.raises(ValueError, match="made from"):
        convert_vae(tmp_path / "vae", tmp_path / "vae", force=True)


def test_a_whole_kl16_has_the_sizes_of_the_official_code():
    from diffusers import AutoencoderKL

    reference = Reference((128, 128, 256, 256, 512), 16)
    reference.run("meta")
    tensors = reference.weights
    config = infer_vae_config(tensors, "kl16")
    assert config["down_block_types"] == ["DownEncoderBlock2D"] * 4 + ["AttnDownEncoderBlock2D"]
    assert config["up_block_types"] == ["UpDecoderBlock2D"] * 5
    assert config["block_out_channels"] == [128, 128, 256, 256, 512]
    assert (config["latent_channels"], config["layers_per_block"], config["scaling_factor"]) == (16, 2, 0.2325)
    with torch.device("meta"):
        expected = AutoencoderKL(**config).state_dict()
    assert {k: t.shape for k, t in diffusers_tensors(tensors).items()} == {k: t.shape for k, t in expected.items()}


def test_bad_autoencoders_are_refused_by_name(weights, tmp_path):
    bias = weights["quant_conv.bias"]
    for content, message in [
        ({"model": {}}, "encoder.conv_in.weight is missing"),
        ({"model": {**weights, "quant_conv.bias": bias / 0}}, "quant_conv.bias holds values"),
        ({"model": {**weights, "surplus": torch.zeros(1)}}, "unknown tensor surplus"),
        ({"model": {**weights, "quant_conv.bias": torch.zeros(3)}}, "quant_conv.bias has shape"),
        ({"model": {**weights, "hook": print}}, "run code"),
    ]:
        torch.save(content, tmp_path / "bad.ckpt")
        with pytest.raises(ValueError, match=message):
            convert_vae(tmp_path / "bad.ckpt", tmp_path / "vae")
        assert [path.name for path in tmp_path.iterdir()] == ["bad.ckpt"]


@pytest.mark.parametrize(
    ("vae", "message"),
    [
        ("stranger/vae", "nothing is fetched that a file names: hf download stranger/vae"),
        *[(name, "is no folder here, nor a hub id") for name in ("/dev/zero", "https://example.com/vae")],
        *[(name, "cannot be loaded") for name in ("", "/dev", "pickled")],
    ],
)
def test_what_a_model_names_as_its_vae_is_neither_fetched_nor_unpickled(vae, message, tmp_path, monkeypatch):
    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harm",)

    monkeypatch.chdir(tmp_path)

    def refuse(*_, **__):
        raise AssertionError("something was asked of the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/config.json").write_text('{"_class_name": "AutoencoderKL"}')
    (tmp_path / "pickled/diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(ValueError, match=message) as caught:
        load_vae(vae)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "harm").exists()


def small_vae():
    """An autoencoder of stride 2."""
    from diffusers import AutoencoderKL

    small = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**small, **kinds)


def test_a_bundled_vae_is_found_by_its_name_from_anywhere(tmp_path, monkeypatch, marval):
    monkeypatch.setattr("marval.io.vae.asset", lambda name: tmp_path / "assets" / name)
    small_vae().half().save_pretrained(tmp_path / "assets/small-vae")
    Path("small-vae").mkdir()  # another of that name, in the current folder, is not taken
    Path("small-vae/config.json").write_text("damaged")
    space = LatentSpace((8, 8), "small-vae", vae_stride=2, latent_channels=4, vae_sha256=vae_hash("small-vae"))
    draw = dataclasses.replace(tiny_config().draw, clip=False)
    save_model("model", tiny_model(), dataclasses.replace(tiny_config(), space=space, draw=draw))
    marval("sample", "model", "--count", 2, "--iterations", 1)
    assert Image.open("samples/00000-cross-0.png").size == (8, 8)
    pipeline = load("model")
    assert {weight.dtype for weight in pipeline.space.vae.parameters()} == {torch.float32}
    pipeline.save("copy")
    assert load_model("copy")[1].space.vae == "small-vae"  # good on another machine
    shutil.copytree(tmp_path / "assets/small-vae", "copy/small-vae")  # beside a model is its own
    assert Path(load("copy").config.space.vae) == Path("copy/small-vae").absolute()

    for label in ("a", "b"):
        Path("pictures", label).mkdir(parents=True)
        Image.new("RGB", (8, 8), "red").save(Path("pictures", label, "red.png"))
    Path("small-vae/config.json").unlink()
    Path("small-vae").rmdir()
    marval("cache", "latents", "--images", "pictures", "--vae", "small-vae", "--image-size", 8)
    data = LatentData.open(Path("latents"))
    assert (data.vae, data.vae_sha256) == ("small-vae", space.vae_sha256)


def test_a_vae_is_looked_for_beside_its_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = LatentSpace((8, 8), "vae", vae_stride=2, latent_channels=4)
    draw = dataclasses.replace(tiny_config().draw, clip=False)
    save_model("model", tiny_model(), dataclasses.replace(tiny_config(), space=space, draw=draw))
    small_vae().save_pretrained("model/vae")
    Path("vae").mkdir()  # another of that name, in the current folder, is not taken
    Path("vae/config.json").write_text("damaged")
    assert load("model").sample([0], iterations=1, seed=0).shape == (1, 3, 8, 8)
    assert load_model("model")[1].space.vae == "vae"  # as the file says
    Path("model/vae").rename("moved")
    save_model(
        "model",
        tiny_model(),
        dataclasses.replace(tiny_config(), space=dataclasses.replace(space, vae="/gone/moved"), draw=draw),
    )
    assert load("model").sample([0], iterations=1, seed=0).shape == (1, 3, 8, 8)  # in the current folder, by its name
