"""The KL autoencoder of the official code: converted to diffusers' form it computes the same."""

import json

import pytest
import torch
import torch.nn.functional as F

from marval.io.vae import convert_vae, diffusers_tensors, infer_vae_config
from marval.runtime.rng import generator

WIDTHS, LATENT, BLOCKS = (32, 64), 4, 2  # two levels; attention in the encoder's last, as in KL-16


def ldm_shapes(widths=WIDTHS, latent=LATENT):
    """Names and shapes of an autoencoder in latent-diffusion's format."""
    shapes = {}

    def conv(name, inputs, outputs, size=3):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs, size, size), (outputs,)

    def norm(name, width):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def residual(name, inputs, outputs):
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", inputs, outputs)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def attention(name, width):
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    def middle(side, width):
        residual(f"{side}.mid.block_1", width, width)
        attention(f"{side}.mid.attn_1", width)
        residual(f"{side}.mid.block_2", width, width)

    first, last = widths[0], widths[-1]
    conv("encoder.conv_in", 3, first)
    width = first
    for level, out in enumerate(widths):
        for block in range(BLOCKS):
            residual(f"encoder.down.{level}.block.{block}", width, out)
            width = out
            if level == len(widths) - 1:
                attention(f"encoder.down.{level}.attn.{block}", width)
        if level < len(widths) - 1:
            conv(f"encoder.down.{level}.downsample.conv", width, width)
    middle("encoder", last)
    norm("encoder.norm_out", last)
    conv("encoder.conv_out", last, 2 * latent)
    conv("quant_conv", 2 * latent, 2 * latent, 1)
    conv("post_quant_conv", latent, latent, 1)
    conv("decoder.conv_in", latent, last)
    middle("decoder", last)
    for level in reversed(range(len(widths))):
        for block in range(BLOCKS + 1):
            residual(f"decoder.up.{level}.block.{block}", width, widths[level])
            width = widths[level]
        if level > 0:
            conv(f"decoder.up.{level}.upsample.conv", width, width)
    norm("decoder.norm_out", first)
    conv("decoder.conv_out", first, 3)
    return shapes


@pytest.fixture
def weights():
    rng = generator("ldm")
    return {
        name: torch.randn(shape, generator=rng) * 0.1 + (1.0 if "norm" in name and "weight" in name else 0.0)
        for name, shape in ldm_shapes().items()
    }


class Reference:
    """The autoencoder's equations, on tensors in latent-diffusion's format."""

    def __init__(self, weights):
        self.w = weights

    def conv(self, name, x, **options):
        return F.conv2d(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], **options)

    def norm(self, name, x):
        return F.group_norm(x, 32, self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps=1e-6)

    def residual(self, name, x):
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), padding=1)
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), padding=1)
        return h + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.w else x)

    def attention(self, name, x):
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")
        weight = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(dim=2)
        return x + self.conv(f"{name}.proj_out", (v @ weight.transpose(1, 2)).unflatten(2, x.shape[2:]))

    def middle(self, side, x):
        x = self.attention(f"{side}.mid.attn_1", self.residual(f"{side}.mid.block_1", x))
        return self.residual(f"{side}.mid.block_2", x)

    def encode(self, x):
        """Mean and log-variance."""
        h = self.conv("encoder.conv_in", x, padding=1)
        for level in range(len(WIDTHS)):
            for block in range(BLOCKS):
                h = self.residual(f"encoder.down.{level}.block.{block}", h)
                if level == len(WIDTHS) - 1:
                    h = self.attention(f"encoder.down.{level}.attn.{block}", h)
            if level < len(WIDTHS) - 1:
                h = self.conv(f"encoder.down.{level}.downsample.conv", F.pad(h, (0, 1, 0, 1)), stride=2)
        h = F.silu(self.norm("encoder.norm_out", self.middle("encoder", h)))
        return self.conv("quant_conv", self.conv("encoder.conv_out", h, padding=1)).chunk(2, dim=1)

    def decode(self, z):
        h = self.middle("decoder", self.conv("decoder.conv_in", self.conv("post_quant_conv", z), padding=1))
        for level in reversed(range(len(WIDTHS))):
            for block in range(BLOCKS + 1):
                h = self.residual(f"decoder.up.{level}.block.{block}", h)
            if level > 0:
                h = self.conv(f"decoder.up.{level}.upsample.conv", F.interpolate(h, scale_factor=2.0), padding=1)
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", h)), padding=1)


def test_the_converted_autoencoder_computes_the_same(weights, tmp_path):
    from diffusers import AutoencoderKL

    torch.save({"model": {**weights, "loss.logvar": torch.zeros(())}}, tmp_path / "kl16.ckpt")
    convert_vae(tmp_path / "kl16.ckpt", tmp_path / "vae")
    vae, reference = AutoencoderKL.from_pretrained(tmp_path / "vae"), Reference(weights)
    rng = generator("picture")
    x, z = torch.randn(2, 3, 16, 16, generator=rng), torch.randn(2, LATENT, 8, 8, generator=rng)
    with torch.no_grad():
        found = vae.encode(x).latent_dist
        for ours, expected in zip((found.mean, found.logvar), reference.encode(x), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(vae.decode(z).sample, reference.decode(z), rtol=1e-4, atol=1e-4)
    about = json.loads((tmp_path / "vae/source.json").read_text())
    assert len(about["sha256"]) == 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kl16.ckpt", "vae"]


def test_a_whole_kl16_has_the_sizes_of_the_official_code():
    from diffusers import AutoencoderKL

    shapes = ldm_shapes((128, 128, 256, 256, 512), 16)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
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
        ({"model": 3}, "holds a int"),
        ({"model": {**weights, "quant_conv.bias": bias / 0}}, "quant_conv.bias holds values"),
        ({"model": {**weights, "quant_conv.bias": bias.int()}}, "quant_conv.bias has torch.int32"),
        ({"model": {**weights, "decoder.norm_out.bias": 0}}, "decoder.conv_norm_out.bias is missing"),
        ({"model": {**weights, "surplus": torch.zeros(1)}}, "unknown tensor surplus"),
        ({"model": {**weights, "quant_conv.bias": torch.zeros(3)}}, "quant_conv.bias has shape"),
        ({"model": {**weights, "hook": print}}, "run code"),
    ]:
        torch.save(content, tmp_path / "bad.ckpt")
        with pytest.raises(ValueError, match=message):
            convert_vae(tmp_path / "bad.ckpt", tmp_path / "vae")
        assert [path.name for path in tmp_path.iterdir()] == ["bad.ckpt"]


def test_a_folder_is_written_over_when_told_to_and_what_else_is_in_it_stays(weights, tmp_path):
    torch.save({"model": weights}, tmp_path / "kl16.ckpt")
    convert_vae(tmp_path / "kl16.ckpt", tmp_path / "vae")
    (tmp_path / "vae/notes.txt").write_text("mine")
    before = (tmp_path / "vae/source.json").read_text()
    torch.save({"model": {name: t + 1 for name, t in weights.items()}}, tmp_path / "kl16.ckpt")
    with pytest.raises(ValueError, match=r"exists already.*--force"):
        convert_vae(tmp_path / "kl16.ckpt", tmp_path / "vae")
    assert (tmp_path / "vae/source.json").read_text() == before
    convert_vae(tmp_path / "kl16.ckpt", tmp_path / "vae", force=True)
    assert (tmp_path / "vae/source.json").read_text() != before
    assert (tmp_path / "vae/notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="made from"):
        convert_vae(tmp_path / "vae", tmp_path / "vae", force=True)
