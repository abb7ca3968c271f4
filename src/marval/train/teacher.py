"""Training a MAR teacher: masked tokens of real images, the diffusion loss, one flat loop."""

import copy
import dataclasses
import math
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from marval.config import Chain, MARConfig, ModelConfig, PixelSpace, TrainConfig
from marval.data import ImageData, batch_indices
from marval.io.checkpoint import save_model
from marval.model import MAR, NoiseSchedule
from marval.model.mar import gather_rows
from marval.objectives.denoising import denoising_loss
from marval.randomness import generator
from marval.spaces import token_space
from marval.train.run import (
    LOG,
    Log,
    fast_attention,
    learning_rate_factor,
    load_state,
    prepare_folder,
    save_state,
    update_ema,
)


def teacher_config(name: str, data: ImageData, data_spec: str, source: str = "") -> ModelConfig:
    """The small teacher for a data set: pixel patches (8 tokens a side or fewer), centred and scaled to the data.

    Fashion-MNIST gives 49 tokens of 4 x 4 pixels.
    """
    rows, columns = data.images.shape[-2:]
    patch = next(p for p in (4, 8, 16, 32, 64) if max(rows, columns) <= 8 * p)
    if rows % patch or columns % patch:
        raise ValueError(f"images of {rows}x{columns} pixels cannot be cut into {patch}x{patch} patches")
    moments = [
        ((part / 255).double().mean(), (part / 255).double().square().mean()) for part in data.images.split(1000)
    ]
    mean, square = (torch.stack(values).mean().item() for values in zip(*moments, strict=True))
    shift, spread = round(mean, 3), max(round(math.sqrt(square - mean**2), 3), 0.001)
    space = PixelSpace((rows, columns), data.images.shape[1], patch, shift, 1 / spread)
    mar = MARConfig.fashion(space.token_grid, space.token_dim, len(data.class_names))
    iterations = min(16, mar.num_tokens)
    draw = Chain(guidance=1.6, clip=True)
    return ModelConfig(mar, space, draw, data.class_names, iterations, name, data_spec, source)


def masked_count(num_tokens: int, ratio_min: float, ratio_std: float, rng: torch.Generator) -> int:
    """How many tokens to mask: the ratio is a normal around 1, cut to [ratio_min, 1] (MAR: 0.7 and std 0.25)."""
    low, high = torch.special.ndtr(torch.tensor([(ratio_min - 1) / ratio_std, 0.0], dtype=torch.float64))
    u = low + (high - low) * torch.rand((), generator=rng, dtype=torch.float64)
    ratio = 1 + ratio_std * torch.special.ndtri(u).clamp(max=0.0)
    return min(num_tokens, max(1, int(torch.ceil(num_tokens * ratio))))


def split_tokens(
    batch: int, num_tokens: int, masked: int, targets: int, rng: torch.Generator
) -> tuple[Int[Tensor, "b v"], Int[Tensor, "b q"]]:
    """A random order per image: its visible positions, and `targets` (at most) of its `masked` hidden ones."""
    order = torch.rand(batch, num_tokens, generator=rng).argsort(dim=1)
    visible = num_tokens - masked
    return order[:, :visible], order[:, visible : visible + min(targets, masked)]


def teacher_loss(
    model: MAR,
    schedule: NoiseSchedule,
    tokens: Float[Tensor, "b l c"],
    labels: Int[Tensor, " b"],
    settings: TrainConfig,
    rng: torch.Generator,
) -> Float[Tensor, ""]:
    """The loss of one batch; every random draw comes from `rng` (on the CPU, so that devices agree)."""
    batch, device = len(tokens), tokens.device
    masked = masked_count(model.config.num_tokens, settings.mask_ratio_min, settings.mask_ratio_std, rng)
    visible, targets = split_tokens(batch, model.config.num_tokens, masked, settings.tokens_per_image, rng)
    drop = (torch.rand(batch, generator=rng) < settings.label_drop).float()
    t = torch.randint(0, len(schedule.timesteps), (targets.numel(),), generator=rng)
    eps = torch.randn(targets.numel(), model.config.token_dim, generator=rng)
    visible, targets, drop, t, eps = (x.to(device, non_blocking=True) for x in (visible, targets, drop, t, eps))
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.autocast):
        context = model.context(tokens, visible, targets, model.class_embedding(labels, drop)).flatten(0, 1)
        x_0 = gather_rows(tokens, targets).flatten(0, 1)
        return denoising_loss(model.head, schedule, x_0, context, t, eps).mean()


def train_teacher(
    config: ModelConfig,
    settings: TrainConfig,
    data: ImageData,
    out: Path,
    *,
    init: MAR | None = None,
    resume: bool = False,
    device: torch.device | str = "cpu",
    quiet: bool = False,
) -> None:
    """Train a teacher and leave its EMA in `out/model`; the training state lies beside it.

    Args:
        init: start from these weights instead of fresh ones.

    Raises:
        ValueError: `init` has other sizes than `config`, `out` holds another run or cannot be written to, or the
            loss is no longer finite.
    """
    prepare_folder(out, resume)
    described = {**config.to_dict(), "source": "", "images": len(data), **dataclasses.asdict(settings)}
    space = token_space(config.space, device)
    if init is not None and init.config != config.mar:
        raise ValueError(f"the initial model's sizes are {init.config}, the data asks for {config.mar}")
    model = init or MAR(config.mar).initialize(generator(settings.seed, "weights"))
    model = copy.deepcopy(model).requires_grad_(True).to(device).train()
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.learning_rate, (0.9, 0.95), weight_decay=settings.weight_decay, fused=True
    )
    start = load_state(out, described, model=model, ema=ema, optimizer=optimizer) if resume else 0
    schedule = NoiseSchedule.full(device)
    log = Log(out / LOG, start, settings.iterations, settings.batch_size, quiet)

    for step in range(start, settings.iterations):
        factor = learning_rate_factor(step, settings.warmup, settings.decay, settings.iterations)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        images, labels = data.batch(batch_indices(len(data), settings.batch_size, step, settings.seed))
        tokens = space.encode(images.to(device))
        if config.mar.dropout:
            torch.manual_seed(generator(settings.seed, "dropout", step).initial_seed())
        with fast_attention(device):
            rng = generator(settings.seed, "noise", step)
            loss = teacher_loss(model, schedule, tokens, labels.to(device), settings, rng)
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, model, step, settings.ema_decay)

        done = step + 1
        saving = done % settings.save_every == 0 or done == settings.iterations
        if saving or done % settings.log_every == 0:  # figures are checked before anything is saved
            log(done, loss=loss.item(), gradient_norm=norm.item(), learning_rate=settings.learning_rate * factor)
        if saving:
            save_state(out, done, described, model=model, ema=ema, optimizer=optimizer)
            save_model(out / "model", ema, config)
