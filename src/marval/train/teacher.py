"""Training a MAR teacher: masked tokens of real images, the diffusion loss, one flat loop."""

import copy
import dataclasses
import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from marval.config import Chain, LatentSpace, MARConfig, ModelConfig, PixelSpace
from marval.data import ImageData, LatentData, TrainingData, patch_size
from marval.data.loader import Loader
from marval.losses.denoising import denoising_loss, level_weights
from marval.model import MAR, NoiseSchedule
from marval.model.blocks import gather_rows
from marval.presets import PRESETS, TrainConfig, preset_size
from marval.runtime.distributed import Workers
from marval.runtime.folder import Run, data_identity, model_identity
from marval.runtime.log import LOG, Figures, Log, add_means, due
from marval.runtime.optim import Optimizer, fast_products, learning_rate_factor, update_ema
from marval.runtime.rng import generator
from marval.runtime.state import State
from marval.sampling.fast import compile_blocks
from marval.spaces import token_space
from marval.train.draws import TeacherDraws, teacher_draws
from marval.train.flops import teacher_flops


def teacher_config(name: str, data: ImageData, data_spec: str, source: str = "") -> ModelConfig:
    """The small teacher for a data set: pixel patches (8 tokens a side or fewer), centred and scaled to the data.

    Fashion-MNIST gives 49 tokens of 4 x 4 pixels.
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
    draw, iterations = Chain(guidance=3.0, clip=True), min(16, mar.num_tokens)
    return conditioned(ModelConfig(mar, space, draw, data.class_names, iterations, name, data_spec, source), data)


def conditioned(config: ModelConfig, data: TrainingData) -> ModelConfig:
    """The configuration of a model of text, where the data have captions; else as it is."""
    if (said := data.captions) is None:
        return config
    mar = dataclasses.replace(config.mar, text_dim=said.sentences.shape[1], num_styles=len(said.styles))
    pairs = zip(data.labels.tolist(), said.style.tolist(), strict=True)
    told = [(label, max(0, style)) for label, style in pairs if style >= 0 or not said.styles]
    seen = {label * mar.labels_per_class + style for label, style in told}
    unseen = tuple(label for label in range(mar.num_labels) if label not in seen)
    return dataclasses.replace(config, mar=mar, encoder=said.encoder, styles=said.styles, unseen=unseen)


def latent_teacher_config(preset: str, name: str, data: LatentData, data_spec: str, source: str = "") -> ModelConfig:
    """A teacher for a cache of latents: the small one ("fashion-mnist"), or "imagenet256-base", "-large" or "-huge".

    The small one keeps x_0 within the data's range: at t = 999 an error of eps enters x_0 20,000 times as large, which
    a chain forgives only where a teacher is trained as far as MAR's.
    """
    channels, rows, columns = data.shape
    small = preset == PRESETS[0]
    space = LatentSpace(
        (data.image_size, data.image_size), data.vae, data.image_size // rows, channels, scale=data.scale,
        vae_sha256=data.vae_sha256, limit=data.limit() if small else 0.0,
    )  # fmt: skip
    grid, classes, guidance, iterations = (rows, columns), len(data.class_names), 3.0, 16
    mar = MARConfig.fashion(grid, channels, classes)
    if not small:
        full, guidance, iterations = MARConfig.imagenet256(preset_size(preset)), 2.9, 64
        mar = dataclasses.replace(full, token_grid=grid, token_dim=channels, num_classes=classes)
    draw, iterations = Chain(guidance=guidance, clip=small), min(iterations, mar.num_tokens)
    config = ModelConfig(mar, space, draw, data.class_names, iterations, name, data_spec, source)
    return conditioned(config, data)


def teacher_loss(
    model: MAR,
    schedule: NoiseSchedule,
    tokens: Float[Tensor, "b l c"],
    given: Shaped[Tensor, "b *f"],
    draws: TeacherDraws,
    autocast: bool,
    weights: Float[Tensor, " t"] | None = None,
) -> Float[Tensor, ""]:
    """The diffusion loss of some images' targets (`draws.part`), in the context of their visible tokens.

    Args:
        weights: of the noise levels.
    """
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=autocast):
        condition = model.embed(given, draws.drop)
        context = model.context(tokens, draws.visible, draws.targets, condition).flatten(0, 1)
        x_0 = gather_rows(tokens, draws.targets).flatten(0, 1)
        return denoising_loss(model.head, schedule, x_0, context, *draws.levels, weights).mean()


def first_network(config: ModelConfig, seed: int, data: TrainingData, init: MAR | None) -> MAR:
    """A network with fresh weights or those of `init`; of text, it knows the data's concepts, not those of `init`."""
    network = MAR(config.mar).initialize(generator(seed, "weights"))
    if init is not None:
        concepts = config.mar.num_classes if config.encoder else init.config.num_classes
        if dataclasses.replace(init.config, num_classes=concepts) != config.mar:
            raise ValueError(f"the initial model's sizes are {init.config}, the data asks for {config.mar}")
        network.load_state_dict({**init.state_dict(), **dict(network.named_buffers())})
    if data.captions is not None:
        network.vocabulary.copy_(data.captions.sentences[: config.mar.num_classes])
    return network


def copy_teacher(first: MAR, settings: TrainConfig, workers: Workers) -> tuple[MAR, MAR, Optimizer]:
    """Copy a network that learns and its average, put them in place, and make the optimizer."""
    workers.parts(settings.batch_size, settings.accumulate)  # refuses a batch that cannot be split
    model, ema = copy.deepcopy(first).requires_grad_(True).train(), copy.deepcopy(first).requires_grad_(False)
    workers.place(model, settings.autocast)
    workers.place(ema)
    model.checkpoint_blocks = settings.checkpoint_blocks
    if settings.compile:
        compile_blocks(model)
    return model, ema, Optimizer(model, workers, settings.gradient_clip, (0.9, 0.95), settings.weight_decay)


def train_teacher(
    config: ModelConfig, settings: TrainConfig, data: TrainingData, run: Run, *, init: MAR | None = None
) -> int:
    """Train a teacher, leave its EMA in the run's `model`, and return the last update.

    Args:
        init: start from these weights instead of fresh ones.

    Raises:
        ValueError: `init` has other sizes than `config`, the run has other settings, or gradients are not finite again
            and again.
    """
    begun = "fresh weights" if init is None else model_identity("init", init)
    workers, device, batch_size = run.workers, run.workers.device, settings.batch_size
    model, ema, adam = copy_teacher(first_network(config, settings.seed, data, init), settings, workers)
    described = {**config.to_dict(), **dataclasses.asdict(settings), "data_set": data_identity(data), "init": begun}
    state = State(run, described, {"model": model, "ema": ema}, {"model": adam})
    start, _ = state.load()
    flops = teacher_flops(model, settings)
    log = Log(run.folder / LOG, workers, start, settings.updates, batch_size, run.tensorboard, flops)
    space, schedule = token_space(config.space, device), NoiseSchedule.full(device)
    loader, weights = Loader(data, settings, space, workers), level_weights(schedule, settings.weighting)

    for update in workers.updates(start, settings.updates):
        draws = teacher_draws(settings, config.mar, update, device)
        figures = Figures()
        with fast_products(device):
            for i, (rows, tokens, given) in enumerate(loader(update)):
                if config.mar.dropout:
                    torch.manual_seed(generator(settings.seed, "dropout", update, workers.rank, i).initial_seed())
                loss = teacher_loss(model, schedule, tokens, given, draws.part(rows), settings.autocast, weights)
                share = workers.share(rows, batch_size)
                (loss * share).backward()
                add_means(figures, share, loss=loss)
        factor = learning_rate_factor(update, settings.warmup_updates, settings.decay, settings.updates)
        figures["gradient_norm"] = adam.step(settings.learning_rate * factor)
        figures["learning_rate"] = settings.learning_rate * factor
        update_ema(ema, model, update, settings.ema_decay)

        now = due(update + 1, settings, workers)
        if now.log:
            log(now.update, figures, [adam])
        if now.save:
            state.save(now.update, model=config)
        if now.last:
            state.wait()
            return now.update
    return start
