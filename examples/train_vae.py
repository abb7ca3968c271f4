"""Train a small autoencoder (diffusers' AutoencoderKL) on your own images, for models of latents.

python examples/train_vae.py folder:my-images models/vae --minutes 60
marval cache cache/mine --images my-images --vae models/vae --image-size 32
marval train --data latents:cache/mine --out runs/teacher

The loss is L1 of the picture, of its edges, and of the picture at 1/2 and 1/4 of its size, with a little KL. Noise on
the latents teaches the decoder to forgive a generator's small errors. Each channel of the finished latents has mean 0
and standard deviation 1, so that a model needs no more than the scale that `marval cache` measures.

The folder then holds what diffusers reads (averaged weights), report.json and reconstructions.png. A run that was
stopped goes on with the same command and --resume.
"""

import copy
import dataclasses
import hashlib
import json
import math
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from marval.checks import Checked
from marval.cli.arguments import usable_device
from marval.cli.options import run_script
from marval.config import Count, NotNegative, Positive, Whole
from marval.data import batch_indices, load_images
from marval.io.files import atomic_folder, write_text
from marval.io.images import grid, save_picture
from marval.presets import ENCODER
from marval.runtime.distributed import start_workers
from marval.runtime.folder import Run, open_run, saved_states
from marval.runtime.optim import Optimizer, update_ema
from marval.runtime.provenance import made_by
from marval.runtime.rng import generator
from marval.runtime.state import State

KL = 1e-4  # the weight of the divergence of a latent's numbers from a standard normal
SHIFT = 1 / 16  # of the picture's side: how far a batch is moved, at most
WARMUP, EMA_DECAY = 100, 0.999  # updates in which the learning rate rises; of the averaged weights
SAVE_SECONDS, PRINT_SECONDS = 60.0, 20.0
SHOWN, HALF_LOSS = 14, 0.05  # pictures of the sheet; dB that float16 may cost


@dataclass(frozen=True)
class Settings(Checked):
    """what a resumed run must not change, but for updates and learning rate"""

    size: Count = 32  # pixels a side, which marval cache calls --image-size
    stride: Count = 4  # pixels a side of one place of the latent
    channels: Count = 8  # of the latent
    width: Count = 48  # channels of the first level; the others have twice as many
    noise: NotNegative = 0.05  # on the latents, in their standard deviations
    batch_size: Count = 64  # images an update
    learning_rate: Positive = 1e-3  # AdamW's, at the start
    bf16: bool = False  # compute in bf16, which is faster on a GPU
    seed: int = 0  # of weights, batches and noise
    updates: Whole = 0  # instead of minutes, for the same result every time

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride & (self.stride - 1) or self.size % self.stride:
            raise ValueError(f"stride {self.stride}: expected a power of 2 that divides --size {self.size}")
        if self.width % 8:
            raise ValueError(f"width {self.width}: expected a multiple of 8")


@dataclass(frozen=True)
class Course(Checked):
    """this run"""

    minutes: Positive = 60.0  # of training, all tries together
    held_out: str = ""  # images to measure on, such as folder:DIR@SPLIT of captioned ones; else a tenth of the data
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    resume: bool = False  # go on with a run that was stopped


def make_vae(settings: Settings) -> Any:
    """Make an autoencoder with seeded weights, and little noise in its posterior."""
    levels = settings.stride.bit_length()
    with torch.random.fork_rng(devices=[]):  # torch's layers draw their weights from the global generator
        torch.manual_seed(generator(settings.seed, "weights").initial_seed())
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=(settings.width, *[2 * settings.width] * (levels - 1)), norm_num_groups=8,
            latent_channels=settings.channels, sample_size=settings.size, scaling_factor=1.0, force_upcast=False,
        )  # fmt: skip
    nn.init.constant_(vae.quant_conv.bias[settings.channels :], -6)  # the logarithm of the posterior's variance
    return vae


def reconstruction_loss(made: Tensor, x: Tensor) -> Tensor:
    """L1 of images (B, C, H, W), of their edges (differences of neighbours), and of the images at 1/2 and 1/4 size."""
    error = made - x
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    half, quarter = F.avg_pool2d(error, 2), F.avg_pool2d(error, 4)
    return error.abs().mean() + edges / 2 + half.abs().mean() + quarter.abs().mean()


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)), the mean over a latent's numbers."""
    return (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2


def augment(images: Tensor, most: int, rng: torch.Generator) -> Tensor:
    """Mirror half of a batch (B, C, H, W), and move all of it by up to `most` pixels; edges repeat."""
    mirrored = torch.rand(len(images), 1, 1, 1, generator=rng) < 0.5
    images = torch.where(mirrored.to(images.device), images.flip(3), images)
    height, width = images.shape[-2:]
    dy, dx = (int(x) for x in torch.randint(0, 2 * most + 1, (2,), generator=rng))
    return F.pad(images, (most,) * 4, mode="replicate")[..., dy : dy + height, dx : dx + width]


def loss_of(vae: Any, x: Tensor, settings: Settings, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """The loss of images in [-1, 1], and the part of it that is their reconstruction's."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=settings.bf16):
        posterior = vae.encode(x).latent_dist
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        spread = mean.detach().var(dim=(0, 2, 3), keepdim=True)
        noise = torch.randn(mean.shape, device=x.device, generator=rng)
        latents = mean + (log_variance.exp() + settings.noise**2 * spread).sqrt() * noise
        made = vae.decode(latents).sample.float()
    reconstruction = reconstruction_loss(made, x)
    return reconstruction + KL * kl_divergence(mean, log_variance), reconstruction


def train(images: Tensor, settings: Settings, minutes: float, run: Run) -> tuple[Any, int] | None:
    """Train on bytes (N, 3, H, W); return the averaged autoencoder and its updates, or None if it was stopped.

    The learning rate falls as a cosine to 0, at the last update or at the end of the minutes.
    """
    workers, device, saved = run.workers, run.workers.device, 0.0
    vae = make_vae(settings).to(device).train()
    ema = copy.deepcopy(vae).requires_grad_(False).eval()
    adam = Optimizer(vae, workers, 1.0, (0.9, 0.99))
    described = {**dataclasses.asdict(settings), "data_set": hashlib.sha256(images.numpy()).hexdigest()}
    state = State(run, described, {"model": vae, "ema": ema}, {"model": adam})
    start, extra = state.load()
    images, torch.backends.cudnn.benchmark = images.to(device), True
    spent, began, printed = float(extra.get("seconds", 0)), time.monotonic(), (start, 0.0)
    for update in workers.updates(start, sys.maxsize):
        now = time.monotonic() - began
        share = update / settings.updates if settings.updates else (spent + now) / (60 * minutes)
        last = share >= 1 or workers.stopping()
        if last or now - saved > SAVE_SECONDS:
            state.save(update, {"seconds": spent + now})
            saved = now
        if last:
            state.wait()
            return (ema, update) if share >= 1 else None

        batch = images[batch_indices(len(images), settings.batch_size, update, settings.seed).to(device)]
        x = augment(batch / 127.5 - 1, round(SHIFT * settings.size), generator(settings.seed, "augment", update))
        loss, reconstruction = loss_of(vae, x, settings, generator(settings.seed, "noise", update, device=device))
        loss.backward()
        rise = min(1.0, (update + 1) / WARMUP)
        norm = adam.step(settings.learning_rate * rise * (1 + math.cos(math.pi * share)) / 2)
        update_ema(ema, vae, update, EMA_DECAY)
        if now - printed[1] > PRINT_SECONDS:
            rate = (update - printed[0]) / (now - printed[1])
            told = f"reconstruction {reconstruction:.4f}, gradient norm {norm:.2f}, {rate:.1f} updates/s"
            print(f"update {update} ({share:.0%}): {told}", flush=True)
            printed = update, now
    return None


@torch.inference_mode()
def encode(vae: Any, images: Tensor) -> Tensor:
    """The posterior's means of bytes (N, 3, H, W), batch by batch, on the CPU."""
    return torch.cat([vae.encode(x.to(vae.device) / 127.5 - 1).latent_dist.mean.cpu() for x in images.split(64)])


@torch.inference_mode()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Pictures in [0, 1] of latents, on the CPU."""
    made = torch.cat([vae.decode(z.to(vae.device)).sample.cpu() for z in latents.split(64)])
    return (made / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def standardise(vae: Any, images: Tensor) -> Tensor:
    """Give each latent channel mean 0 and standard deviation 1 on `images`; return the deviations before.

    The 1x1 convolutions on both sides of the latent take the change, so that pictures stay what they are.
    """
    latents = encode(vae, images).double()
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    m, s, c = mean.float().to(vae.device), std.float().to(vae.device), len(mean)
    into, out = vae.quant_conv, vae.post_quant_conv
    into.weight[:c] /= s[:, None, None, None]
    into.bias[:c] = (into.bias[:c] - m) / s
    into.bias[c:] -= 2 * s.log()  # of the variance
    out.bias += out.weight[:, :, 0, 0] @ m
    out.weight *= s[:, None, None]
    return std


def psnr(made: Tensor, images: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [0, 1], of the mean square error of all of them."""
    return round(-10 * math.log10((made - images / 255).square().mean().item()), 3)


def border_error(made: Tensor, images: Tensor, stride: int) -> float | None:
    """Compute the square error at the borders of the latent's places over that inside; the pictures' rims left out."""
    error = (made - images / 255).square().mean(dim=(0, 1))[1:-1, 1:-1]
    rows, columns = (torch.arange(1, side + 1) % stride for side in error.shape)
    at_border = [(places == 0) | (places == stride - 1) for places in (rows, columns)]
    border = at_border[0][:, None] | at_border[1]
    return None if border.all() else round((error[border].mean() / error[~border].mean()).item(), 3)


def evenly(images: Tensor, count: int) -> Tensor:
    """Take at most `count` of them, from all parts alike."""
    return images[torch.linspace(0, len(images) - 1, min(count, len(images))).long()]


def measure(vae: Any, seen: Tensor, held_out: Tensor, stride: int) -> tuple[dict[str, Any], Tensor]:
    """Measure an autoencoder whose latents are standardised; return its figures, and its pictures of `held_out`."""
    latents = encode(vae, held_out)
    made, noise = decode(vae, latents), torch.randn(latents.shape, generator=generator("measure"))
    figures = {
        "psnr_held_out": psnr(made, held_out),
        "psnr_held_out_noise_0.1": psnr(decode(vae, latents + 0.1 * noise), held_out),
        "psnr_seen": psnr(decode(vae, encode(vae, seen)), seen),
        "error_at_borders_over_inside": border_error(made, held_out, stride),
    }
    return figures, made


def finish(vae: Any, updates: int, images: Tensor, held_out: Tensor, settings: Settings, out: Path) -> dict[str, Any]:
    """Write the autoencoder, in float16 where that costs nearly nothing, with its report and a sheet of pictures."""
    std = standardise(vae, images)
    seen = evenly(images, len(held_out))
    single, _ = measure(vae, seen, held_out, settings.stride)
    halved = copy.deepcopy(vae).half().float()
    figures, made = measure(halved, seen, held_out, settings.stride)
    half = single["psnr_held_out"] - figures["psnr_held_out"] < HALF_LOSS
    report = {
        "parameters": sum(parameter.numel() for parameter in vae.parameters()), "updates": updates,
        "images": len(images), "held_out": len(held_out), **(figures if half else single),
        "std_before_standardising": [round(s, 4) for s in std.tolist()], "float16": half,
        "settings": dataclasses.asdict(settings), **made_by(vae.device),
    }  # fmt: skip
    with atomic_folder(out) as partial:
        (vae.half() if half else vae).save_pretrained(partial)
        (partial / "diffusion_pytorch_model.safetensors").chmod((partial / "config.json").stat().st_mode)
        rows = [evenly(held_out, SHOWN) / 255, evenly(made, SHOWN)]
        save_picture(partial / "reconstructions.png", grid(rows, ["held out", "decoded"]))
        write_text(partial / "report.json", json.dumps(report, indent=1) + "\n")
    return report


def read_images(data: str, held_out: str, settings: Settings) -> tuple[Tensor, Tensor]:
    """Read the images to train on and those to measure on, as bytes: a tenth of `data` where no others are named."""
    size = settings.size, settings.size
    images = load_images(data, size=size, channels=3, encoder=ENCODER).images
    if held_out:
        return images, load_images(held_out, size=size, channels=3, encoder=ENCODER).images
    order = torch.randperm(len(images), generator=generator(settings.seed, "held out"))
    if (count := len(images) // 10) == 0:
        raise ValueError(f"{data} holds {len(images)} images: expected at least 10, or name others with --held-out")
    return images[order[count:]], images[order[:count]]


def train_vae(data: str, out: Path, *, settings: Settings, course: Course) -> None:
    """Train a small autoencoder (diffusers' AutoencoderKL) on your own images.

    Args:
        data: the images, as marval train takes them: folder:DIR, of classes or with captions
        out: the folder to write
    """
    if (out / "config.json").exists():
        raise ValueError(f"{out} holds an autoencoder already: choose another place, or remove it")
    with (
        start_workers(usable_device(course.device)) as workers,
        open_run(out, resume=course.resume, workers=workers) as run,
    ):
        images, held_out = read_images(data, course.held_out, settings)
        trained = train(images, settings, course.minutes, run)
        if trained is None:
            print(f"{out}: stopped; the same command with --resume goes on")
            return
        report = finish(*trained, images, held_out, settings, out)
        for state in saved_states(out):  # the learning rate has reached 0: there is nothing to go on with
            shutil.rmtree(state)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    run_script(train_vae)
