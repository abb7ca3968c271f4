"""The verbs that prepare a run or its models: convert, cache-latents, plan and average."""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from tyro.conf import Positional

from marval.cli.arguments import usable_device
from marval.config import Order, Size
from marval.provenance import command_line, made_by

if TYPE_CHECKING:
    from marval.config import ModelConfig
    from marval.model import MAR


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
    force: bool = False,
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
        force: write over what is there.
    """
    from marval.io.checkpoint import WEIGHTS, load_model
    from marval.io.files import check_replace
    from marval.io.official import Given, find_file, official_model, save_official
    from marval.io.vae import convert_vae
    from marval.pipeline import find_model
    from marval.spaces import vae_hash, vae_place

    given = Given(heads, image_size, vae_stride, patch_size)
    if kind != "mar" and given != Given():
        raise ValueError("--heads, --image-size, --vae-stride and --patch-size are for marval convert mar alone")
    if kind == "vae":
        convert_vae(source, out, force)
    elif kind == "to-mar":
        if out.suffix == ".safetensors":
            raise ValueError(f"{out}: official checkpoints are pickles; choose a name that ends in .pth")
        model = find_model(source)
        check_replace(out, [out], read=model / WEIGHTS if model.is_dir() else model, force=force)
        save_official(out, load_model(model)[0])
    else:
        check_replace(out, model_files(out), read=find_file(Path(source)), force=force)
        write_model(out, *official_model(source, given, ema=ema, vae=vae_place(vae), vae_sha256=vae_hash(vae)))
    print(f"{source} -> {out}")


def model_files(folder: Path) -> list[Path]:
    """The files of a model's folder."""
    from marval.io.checkpoint import WEIGHTS

    return [folder / WEIGHTS, folder / "config.json"]


def write_model(folder: Path, model: "MAR", config: "ModelConfig", half: bool = False) -> None:
    """A model's folder, whole or not at all."""
    import torch

    from marval.io.checkpoint import save_model
    from marval.io.files import atomic_folder

    with atomic_folder(folder) as partial:
        save_model(partial, model, config, torch.float16 if half else torch.float32)


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
    if image_size < 1 or batch_size < 1 or not (scale is None or 0 < scale < math.inf):
        raise ValueError(
            f"--image-size {image_size} --batch-size {batch_size} --scale {scale}: expected numbers above 0"
        )
    from marval.data import cache_latents as run
    from marval.parallel import start_workers
    from marval.spaces import load_vae

    with start_workers(usable_device(device)) as workers:
        done = run(
            images, vae, out, image_size=image_size, batch_size=batch_size, scale=scale, workers=workers,
            load_vae=lambda: load_vae(vae, workers.device, download=True),  # typed by the user
        )  # fmt: skip
        if workers.main:
            print(f"{out}: " + (f"{len(done)} images" if done else "stopped; the same command goes on"))


def plan(
    presets: Positional[tuple[Literal["imagenet256-base", "imagenet256-large", "imagenet256-huge"], ...]],
    *,
    gpus: int = 8,
    gpu_memory: float = 80.0,
    tflops: float = 312.0,
    efficiency: float = 0.35,
    float32_tflops: float = 19.5,
    out: Path | None = None,
) -> None:
    """What a full-size run needs: memory, arithmetic, disk and days; nothing is allocated.

    marval plan imagenet256-huge --gpus 8

    marval plan imagenet256-base --gpus 4 --gpu-memory 24 --tflops 165 --efficiency 0.3

    Args:
        presets: the sizes of the networks and the recipes of both stages.
        gpus: processes that share the work, one on each GPU.
        gpu_memory: of one GPU, in GiB.
        tflops: peak of one GPU in bf16, in TFLOP/s (A100: 312, H100: 989).
        efficiency: the share of that peak that the transformers reach.
        float32_tflops: peak of one GPU in float32 without tensor cores (A100: 19.5, H100: 67), for the heads.
        out: a JSON file that keeps the figures.
    """
    if not presets:
        raise ValueError("name a preset: imagenet256-base, imagenet256-large or imagenet256-huge")
    given = {"gpus": gpus, "gpu-memory": gpu_memory, "tflops": tflops, "efficiency": efficiency}
    for name, value in {**given, "float32-tflops": float32_tflops}.items():
        if not value > 0:
            raise ValueError(f"--{name} {value}: expected a number above 0")
    import torch

    from marval.evaluate.results import write_results
    from marval.plan import GIB, plan_rows, report

    rows = []
    for preset in presets:
        size = cast(Size, preset.removeprefix("imagenet256-"))
        rows += plan_rows(size, gpus, int(gpu_memory * GIB), tflops * 1e12, efficiency, float32_tflops * 1e12)
        print("\n".join([*([f"{preset}:"] if len(presets) > 1 else []), *report(rows[-2:])]))
    if out is not None:
        made = made_by(torch.device("cpu"))
        write_results(out, "plan", [{**row, "made": made} for row in rows], 0)


def average(
    models: Positional[tuple[str, ...]],
    *,
    out: Path,
    name: str | None = None,
    order: Order | None = None,
    half: bool = False,
    force: bool = False,
) -> None:
    """Average the weights of models that came from one teacher (a model soup, Wortsman et al. 2022).

    marval average runs/student-a runs/student-b --out models/student

    marval average runs/student --half --out models/small

    Args:
        models: models' names or folders, of the same sizes and the same way to draw.
        out: the model's folder.
        name: its name; the first model's when left out.
        order: its default order of drawing; the first model's when left out.
        half: half precision on disk.
        force: write over what is there.
    """
    from marval.io.checkpoint import WEIGHTS, average_models, load_model
    from marval.io.files import check_replace
    from marval.io.official import check_weights
    from marval.pipeline import find_model

    if not models:
        raise ValueError("name at least one model, for example: marval average runs/a runs/b --out models/average")
    for folder in map(find_model, models):
        check_replace(out, model_files(out), read=folder / WEIGHTS if folder.is_dir() else folder, force=force)
    model, config = average_models([load_model(find_model(name)) for name in models])
    weights = model.state_dict()
    check_weights(", ".join(models), {name: t.half() for name, t in weights.items()} if half else weights)
    config = dataclasses.replace(
        config, name=name or config.name, order=order or config.order, source=f"{config.source}; {command_line()}"
    )
    write_model(out, model, config, half)
    print(f"{', '.join(models)} -> {out}")
