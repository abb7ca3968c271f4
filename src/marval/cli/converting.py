"""The verbs that prepare a run or its models: convert and cache-latents."""

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from marval.cli.arguments import usable_device


def convert(
    kind: Positional[Literal["mar", "to-mar", "vae", "onnx"]],
    source: Positional[str],
    out: Positional[Path],
    *,
    heads: int | None = None,
    image_size: int | None = None,
    vae_stride: int | None = None,
    patch_size: int | None = None,
    vae: str = "kl16",
    ema: bool = True,
    iterations: int | None = None,
    force: bool = False,
) -> None:
    """Bring official MAR checkpoints into marval's form, or back; or a student into ONNX.

    marval convert mar mar_base/checkpoint-last.pth models/mar-base --vae models/kl16

    marval convert to-mar runs/student student.pth

    Args:
        kind: "mar": an official .pth, flat safetensors or a folder with one, to a model folder; "to-mar": back;
            "vae": the official kl16.ckpt to a diffusers folder; "onnx": a student to an ONNX file.
        source: the checkpoint, or the model to write back.
        out: the model folder, or the .pth or .onnx to write.
        heads: attention heads, where the widths are not MAR-B's, -L's or -H's.
        image_size: pixels a side; checked against the tensors.
        vae_stride: pixels a latent; the checkpoint's args or 16 when left out.
        patch_size: latents a token's side; the checkpoint's args or 1 when left out.
        vae: the VAE's folder or hub id, for the configuration.
        ema: take the averaged weights.
        iterations: K of the ONNX file; the model's own when left out.
        force: write over what is there.
    """
    from marval.io.official import Hints, convert_mar, convert_to_mar
    from marval.io.vae import convert_vae
    from marval.pipeline import find_model

    hints = Hints(heads, image_size, vae_stride, patch_size)
    if kind != "mar" and hints != Hints():
        raise ValueError("--heads, --image-size, --vae-stride and --patch-size are for marval convert mar alone")
    if kind != "onnx" and iterations is not None:
        raise ValueError("--iterations is for marval convert onnx alone: other models draw in any number of them")
    if kind == "onnx":
        convert_onnx(source, out, iterations, force)
        return
    if kind == "vae":
        convert_vae(source, out, force)
    elif kind == "to-mar":
        convert_to_mar(find_model(source), out, force=force)
    else:
        convert_mar(source, out, hints, ema=ema, vae=vae, force=force)
    print(f"{source} -> {out}")


def convert_onnx(source: str, out: Path, iterations: int | None, force: bool) -> None:
    """Write a student as ONNX, checked with onnxruntime."""
    from marval.io.checkpoint import weights_file
    from marval.io.files import check_replace
    from marval.io.onnx import export_onnx
    from marval.pipeline import find_model, load

    check_replace(out, source=weights_file(find_model(source)), folder=False, force=force)
    pipeline = load(source)
    iterations = pipeline.default_iterations if iterations is None else iterations
    difference = export_onnx(pipeline.model, pipeline.config, iterations, out)
    print(f"{source} -> {out}: K = {iterations}; onnxruntime's pictures differ from PyTorch's by {difference:.1g}")


def cache_latents(
    out: Positional[Path],
    *,
    images: Path,
    vae: str,
    image_size: int = 256,
    scale: float | None = None,
    batch_size: int = 32,
    device: str = "auto",
) -> None:
    """Encode a folder of images once, for training on latents; a run that was stopped goes on where it was.

    marval cache-latents cache/imagenet --images imagenet/train --vae models/kl16 --scale 0.2325

    torchrun --nproc_per_node 8 -m marval cache-latents cache/mine --images my-images --vae models/kl16

    Args:
        out: the cache's folder: 32 KiB an image for 256 pixels and KL-16.
        images: one sub-folder of images per class; WordNet ids become ImageNet's names.
        vae: a folder in diffusers' form (marval convert vae makes one), or a hub id.
        image_size: pixels a side, after a centre crop.
        scale: of the latents; fitted (1 / standard deviation) when left out. MAR's KL-16 on ImageNet: 0.2325.
        batch_size: images encoded at a time (each with its mirror).
        device: "auto", "cpu", "cuda", "mps", ...
    """
    from marval.data import cache_latents as run
    from marval.runtime.distributed import start_workers

    with start_workers(usable_device(device)) as workers:
        cached = run(images, vae, out, image_size=image_size, batch_size=batch_size, scale=scale, workers=workers)
        if workers.main and not cached:
            print(f"{out}: stopped; the same command goes on")
