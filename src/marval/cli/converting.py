"""The verbs that prepare models and data: convert and cache."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from marval.checks import Checked
from marval.cli.arguments import usable_device
from marval.config import Count, Positive


@dataclass(frozen=True)
class Conversion(Checked):
    """options"""

    heads: Count | None = None  # mar: attention heads, where the widths are not MAR-B's, -L's or -H's
    vae: str = "kl16"  # mar: the VAE's folder or hub id, for the configuration
    iterations: int | None = None  # onnx: K of the file; the model's own when left out
    force: bool = False  # write over what is there


def convert(kind: Literal["mar", "vae", "onnx"], source: str, out: Path, *, options: Conversion) -> None:
    """Convert official MAR checkpoints and VAEs to models, and students to ONNX.

    marval convert mar mar_base/checkpoint-last.pth models/mar-base --vae models/kl16
    marval convert onnx fashion-student student.onnx --iterations 4

    Args:
        kind: mar: an official .pth, flat safetensors or a folder with one, to a model's folder; vae: the official
            kl16.ckpt to a diffusers folder; onnx: a student to an ONNX file
        source: the checkpoint, or the student
        out: the folder or the .onnx to write
    """
    from marval.io.checkpoint import weights_file
    from marval.io.files import check_replace
    from marval.io.find import find_model
    from marval.io.official import convert_mar
    from marval.io.onnx import export_onnx
    from marval.io.vae import convert_vae
    from marval.pipeline import load

    told = ""
    if kind == "mar":
        convert_mar(source, out, options.heads, vae=options.vae, force=options.force)
    elif kind == "vae":
        convert_vae(source, out, options.force)
    else:
        check_replace(out, source=weights_file(find_model(source)), folder=False, force=options.force)
        pipeline = load(source)
        k = pipeline.default_iterations if options.iterations is None else options.iterations
        difference = export_onnx(pipeline.model, pipeline.config, k, out)
        told = f": K = {k}; onnxruntime's pictures differ from PyTorch's by {difference:.1g}"
    print(f"{source} -> {out}{told}")


@dataclass(frozen=True)
class Latents(Checked):
    """options"""

    images: Path | None = None  # one sub-folder of images per class (WordNet ids become ImageNet's names), or captions
    vae: str = ""  # a folder in diffusers' form (marval convert vae makes one), a bundled one, or a hub id
    image_size: Count = 256  # pixels a side, after a centre crop
    scale: Positive | None = None  # of the latents; 1 / standard deviation when left out (ImageNet, KL-16: 0.2325)
    mirrors: bool = True  # train on mirrors as well; not where left and right differ, as letters do
    batch_size: Count = 32  # images encoded at a time (each with its mirror)
    device: str = "auto"  # auto, cpu, cuda or cuda:N


def cache(out: Path, *, latents: Latents) -> None:
    """Encode a folder of images once, for training on latents.

    marval cache cache/imagenet --images imagenet/train --vae models/kl16 --scale 0.2325
    torchrun --nproc_per_node 8 -m marval cache cache/mine --images my-images --vae models/kl16

    A run that was stopped goes on where it was.

    Args:
        out: the cache's folder: 32 KiB an image for 256 pixels and KL-16
    """
    if latents.images is None or not latents.vae:
        raise ValueError("name the images with --images DIR and their VAE with --vae DIR")
    from marval.data import cache_latents
    from marval.runtime.distributed import start_workers

    with start_workers(usable_device(latents.device)) as workers:
        done = cache_latents(
            latents.images, latents.vae, out, image_size=latents.image_size, batch_size=latents.batch_size,
            scale=latents.scale, mirrors=latents.mirrors, workers=workers,
        )  # fmt: skip
        if workers.main and not done:
            print(f"{out}: stopped; the same command goes on")
