"""The verb that reads and writes other people's checkpoints: convert."""

from pathlib import Path
from typing import Literal

from tyro.conf import Positional


def convert(
    kind: Positional[Literal["mar", "to-mar", "vae"]],
    source: Positional[str],
    out: Positional[Path],
    *,
    heads: int | None = None,
    image_size: int | None = None,
    vae_stride: int | None = None,
    patch_size: int | None = None,
    vae: str = "kl16",
    ema: bool = True,
) -> None:
    """Bring official MAR checkpoints into marval's form, or back.

    marval convert mar mar_base/checkpoint-last.pth models/mar-base --vae models/kl16

    marval convert to-mar runs/student student.pth

    Args:
        kind: "mar": an official .pth, flat safetensors or a folder with one, to a model folder; "to-mar": back;
            "vae": the official kl16.ckpt to a diffusers folder.
        source: the checkpoint, or the model to write back.
        out: the model folder, or the .pth to write.
        heads: attention heads, where the widths are not MAR-B's, -L's or -H's.
        image_size: pixels a side; checked against the tensors.
        vae_stride: pixels a latent; the checkpoint's args or 16 when left out.
        patch_size: latents a token's side; the checkpoint's args or 1 when left out.
        vae: the VAE's folder or hub id, for the configuration.
        ema: take the averaged weights.
    """
    from marval.io.checkpoint import load_model, save_model
    from marval.io.official import Given, official_model, save_official
    from marval.io.vae import convert_vae
    from marval.pipeline import find_model

    if kind == "vae":
        convert_vae(source, out)
    elif kind == "to-mar":
        save_official(out, load_model(find_model(source))[0])
    else:
        save_model(out, *official_model(source, Given(heads, image_size, vae_stride, patch_size), ema=ema, vae=vae))
    print(f"{source} -> {out}")
