"""Training a MAR teacher: masked tokens of real images, the diffusion loss, one flat loop."""

import copy
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from marval.config import Chain, LatentSpace, MARConfig, ModelConfig, PixelSpace
from marval.data import ImageData, LatentData, TrainingData, batch_indices, patch_size
from marval.losses.denoising import denoising_loss
from marval.model import MAR, NoiseSchedule
from marval.model.diffusion import NUM_TIMESTEPS
from marval.model.mar import gather_rows
from marval.presets import TrainConfig
from marval.runtime.distributed import Workers
from marval.runtime.folder import claims_folder, data_identity, model_identity
from marval.runtime.log import LOG, Log
from marval.runtime.optim import Updates, fast_attention, learning_rate_factor, update_ema
from marval.runtime.rng import generator
from marval.runtime.state import load_state, save_network, save_state, state_tensors
from marval.spaces import token_space
from marval.train.draws import hidden_positions, noise_levels


def teacher_config(name: str, data: ImageData, data_spec: str, source: str = "") -> ModelConfig:
    """The small teacher for a data set: pixel patches (8 tokens a side or fewer), centred and scaled to the data.

    Fashion-MNIST gives 49 tokens of 4 x 4 pixels.

    Raises:
        ValueError: a size that cannot be cut into such patches.
    """
    rows, columns = data.images.shape[-2:]
    patch = patch_size(rows, columns)
    sums = torch.zeros(2, dtype=torch.float64)
    for part in data.images.split(1000):
        values = (part / 255).double()
        sums += torch.stack([values.sum(), values.square().sum()])
    mean, square = (sums / data.images.numel()).tolist()
    shift, spread = round(mean, 3), max(round(math.sqrt(square - mean**2), 3), 0.001)
    space = PixelSpace((rows, columns), data.images.shape[1], patch, shift, 1 / spread)
    mar = MARConfig.fashion(space.token_grid, space.token_dim, len(data.class_names))
    iterations = min(16, mar.num_tokens)
    draw = Chain(guidance=3.0, clip=True)
    return ModelConfig(mar, space, draw, data.class_names, iterations, name, data_spec, source)


def latent_teacher_config(preset: str, name: str, data: LatentData, data_spec: str, source: str = "") -> ModelConfig:
    """A full-size teacher ("imagenet256-base", "-large" or "-huge") for a cache of latents.

    Raises:
        ValueError: another preset.
    """
    sizes: dict[str, Literal["base", "large", "huge"]] = {
        "imagenet256-base": "base", "imagenet256-large": "large", "imagenet256-huge": "huge",
    }  # fmt: skip
    if preset not in sizes:
        raise ValueError(f"the preset {preset} trains on images; for latents name one of {', '.join(sizes)}")
    channels, rows, columns = data.shape
    space = LatentSpace(
        (data.image_size, data.image_size), data.vae, data.image_size // rows, channels, scale=data.scale,
        vae_sha256=data.vae_sha256,
    )  # fmt: skip
    mar = dataclasses.replace(
        MARConfig.imagenet256(sizes[preset]), token_grid=(rows, columns), token_dim=channels,
        num_classes=len(data.class_names),
    )  # fmt: skip
    iterations = min(64, mar.num_tokens)
    return ModelConfig(mar, space, Chain(guidance=2.9), data.class_names, iterations, name, data_spec, source)


@dataclass(frozen=True)
class Draws:
    """The random draws of a step, one row per image."""

    visible: Int[Tensor, "b v"]
    targets: Int[Tensor, "b q"]
    drop: Float[Tensor, " b"]  # 1 where the label is dropped
    t: Int[Tensor, "b q"]
    eps: Float[Tensor, "b q c"]

    def rows(self, rows: slice, device: torch.device) -> "Draws":
        """Some images' draws, on the device."""
        parts = (self.visible, self.targets, self.drop, self.t, self.eps)
        return Draws(*(part[rows].to(device, non_blocking=True) for part in parts))


def draw(mar: MARConfig, settings: TrainConfig, rng: torch.Generator) -> Draws:
    """One mask ratio for the batch; for every image what is hidden, whether its label is, and noise for its targets."""
    visible, targets = hidden_positions(mar.num_tokens, settings, rng)
    drop = (torch.rand(settings.batch_size, generator=rng) < settings.label_drop).float()
    t, eps = noise_levels((*targets.shape, mar.token_dim), 0, NUM_TIMESTEPS - 1, rng)
    return Draws(visible, targets, drop, t, eps)


def teacher_loss(
    model: MAR,
    schedule: NoiseSchedule,
    tokens: Float[Tensor, "b l c"],
    labels: Int[Tensor, " b"],
    draws: Draws,
    autocast: bool,
) -> Float[Tensor, ""]:
    """The diffusion loss of a batch's target tokens, in the context of its visible ones."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=autocast):
        embedding = model.class_embedding(labels, draws.drop)
        context = model.context(tokens, draws.visible, draws.targets, embedding).flatten(0, 1)
        x_0 = gather_rows(tokens, draws.targets).flatten(0, 1)
        t, eps = draws.t.flatten(), draws.eps.flatten(0, 1)
        return denoising_loss(model.head, schedule, x_0, context, t, eps).mean()


@claims_folder
def train_teacher(
    config: ModelConfig,
    settings: TrainConfig,
    data: TrainingData,
    out: Path,
    *,
    init: MAR | None = None,
    resume: bool = False,
    workers: Workers | None = None,
    quiet: bool = False,
) -> int:
    """Train a teacher, leave its EMA in `out/model` and the training state beside it; returns the last step.

    Args:
        init: start from these weights instead of fresh ones.
        workers: the processes that share the work; this one alone when None.

    Raises:
        ValueError: `init` has other sizes than `config`, `out` holds another run or cannot be written to, or too
            many steps in a row had gradients that are not finite.
    """
    workers = workers or Workers()
    device = workers.device
    described = {
        **config.to_dict(), "images": len(data), **dataclasses.asdict(settings), "data_set": data_identity(data),
        "init": "fresh weights" if init is None else model_identity("init", init),
    }  # fmt: skip
    space = token_space(config.space, device)
    if init is not None and init.config != config.mar:
        raise ValueError(f"the initial model's sizes are {init.config}, the data asks for {config.mar}")
    first = init or MAR(config.mar).initialize(generator(settings.seed, "weights"))
    model = workers.place(copy.deepcopy(first).requires_grad_(True).train())
    model.checkpoint_blocks = settings.checkpoint_blocks
    ema = workers.place(copy.deepcopy(first).requires_grad_(False))
    update = Updates(model, settings, (0.9, 0.95), settings.weight_decay)
    state = state_tensors({"model": model, "ema": ema}, {"model": update})
    start, _ = load_state(out, described, state, workers) if resume else (0, None)
    schedule = NoiseSchedule.full(device)
    log = Log(out / LOG, start, settings.updates, settings.batch_size, quiet=quiet, workers=workers)
    parts = workers.parts(settings.batch_size, settings.accumulate)

    for step in workers.steps(start, settings.updates):
        indices = batch_indices(len(data), settings.batch_size, step, settings.seed)
        draws = draw(config.mar, settings, generator(settings.seed, "noise", step))
        loss = torch.zeros((), device=device)
        for i, rows in enumerate(parts):
            tokens, labels = data.tokens(indices, rows, space, device, (settings.seed, "data", step))
            if config.mar.dropout:
                torch.manual_seed(generator(settings.seed, "dropout", step, workers.rank, i).initial_seed())
            with fast_attention(device):
                part = teacher_loss(
                    model, schedule, tokens, labels, draws.rows(rows, device), settings.autocast
                ) * workers.share(rows, settings.batch_size)
                part.backward()
            loss += part.detach()
        factor = learning_rate_factor(step, settings.warmup_updates, settings.decay, settings.updates)
        norm = update(settings.learning_rate * factor)
        update_ema(ema, model, step, settings.ema_decay)

        done = step + 1
        last = done == settings.updates or workers.stopping()
        saving = last or done % settings.save_every == 0
        if saving or done % settings.log_every == 0:  # figures are checked before anything is saved
            rate = settings.learning_rate * factor
            log(done, {"loss": loss, "gradient_norm": norm, "learning_rate": rate}, [update])
        if saving:
            save_network(out / "model", ema, config, workers)
            save_state(out, done, described, state, {}, workers)
        if last:
            return done
    return start
