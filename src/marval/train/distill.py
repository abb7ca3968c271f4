"""GSIM distillation: a teacher's diffusion chain becomes one call of its head (MARVAL, stage 1); one flat loop."""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from marval.config import Chain, ModelConfig, Objective, OneStep
from marval.data import TrainingData
from marval.data.loader import Batches, Loader
from marval.losses.energy import energy_score
from marval.losses.gsim import phi_loss, theta_loss
from marval.model import MAR, NoiseSchedule, TokenHead
from marval.model.cached import Groups
from marval.pipeline import Pipeline
from marval.presets import DistillConfig
from marval.runtime.distributed import Workers
from marval.runtime.folder import Run, data_identity, model_identity
from marval.runtime.log import LOG, Figures, Log, add_means, due
from marval.runtime.optim import Optimizer, fast_products, learning_rate_factor, update_ema
from marval.runtime.state import State
from marval.sampling import DrawTokens, draw_function, guidance_at, guided_eps
from marval.sampling.draw import Draw, Guidance, is_guided
from marval.sampling.fast import cast_frozen, compile_blocks
from marval.spaces import token_space
from marval.train.draws import EnergyDraws, GSIMDraws, NoiseLevels, gsim_draws
from marval.train.flops import gsim_flops

Probe = Callable[[Pipeline], dict[str, float]]  # figures of a model, on fixed seeds
# A part's tokens as the student drew them, which phi learns from: weight in the batch, contexts, w, x_0, levels.
DrawnPart = tuple[float, Tensor, Guidance, Tensor, list[NoiseLevels]]


class Inputs(NamedTuple):
    """What a context network sees."""

    tokens: Tensor  # (b, l, c)
    visible: Tensor  # (b, v)
    targets: Tensor  # (b, q), whose contexts are asked for
    given: Tensor  # labels (b,) or vectors of prompts (b, f)
    groups: Groups | None = None  # what is drawn together, of a network with a cache


def student_config(teacher: ModelConfig, settings: DistillConfig) -> tuple[ModelConfig, DistillConfig]:
    """The student's configuration, and the settings with the teacher's guidance where they leave it open."""
    if not isinstance(teacher.draw, Chain):
        raise ValueError(f"{teacher.name or 'this model'} is a one-step student already: expected a teacher")
    w = teacher.draw.guidance if settings.guidance is None else settings.guidance
    schedule = settings.guidance_schedule or teacher.draw.guidance_schedule
    settings = dataclasses.replace(settings.within(teacher.mar.num_tokens), guidance=w, guidance_schedule=schedule)
    mar = dataclasses.replace(teacher.mar, guidance_range=settings.guidance_range, cached=settings.cached)
    draw = OneStep(settings.timestep, teacher.draw.clip, w, schedule)
    name, iterations, order = settings.name, settings.iterations, settings.order
    return dataclasses.replace(teacher, mar=mar, draw=draw, name=name, iterations=iterations, order=order), settings


def revealed_after(visible: int, tokens: int, iterations: int) -> float:
    """The fraction that is revealed once the targets are drawn: what w depends on, as in the sampler.

    A training context has no iteration k, but its masked fraction m places it on the cosine schedule of K iterations,
    m = cos(pi/2 k/K); one iteration later that is

        revealed = 1 - cos(min(pi/2, arccos(m) + pi/(2K))),    at most (L - 1) / L as in MAR.
    """
    masked = 1 - visible / tokens
    angle = min(math.pi / 2, math.acos(masked) + math.pi / (2 * iterations))
    return min(1 - math.cos(angle), (tokens - 1) / tokens)


def masked_parts(
    update: int, settings: DistillConfig, student: ModelConfig, loader: Batches, workers: Workers
) -> Iterator[tuple[float, Guidance, Inputs, GSIMDraws]]:
    """Load and mask a batch of real images, part by part of this process's share.

    Each part comes with its weight in the batch's mean, the teacher's w (each target's own where the student takes w),
    what context networks see, and its draws.
    """
    draws = gsim_draws(settings, student.mar, update, workers.device)
    revealed = revealed_after(draws.visible.shape[1], student.mar.num_tokens, student.iterations)
    w = guidance_at(student.draw.guidance, student.draw.guidance_schedule, revealed)
    for rows, tokens, given in loader(update):
        part = draws.part(rows)
        own = w if part.guidance is None else part.guidance
        inputs = Inputs(tokens, part.visible, part.targets, given, part.groups)
        yield workers.share(rows, settings.batch_size), own, inputs, part


def target_contexts(
    model: MAR, inputs: Inputs, *, guided: bool, autocast: bool, noise: Float[Tensor, "b q c"] | None = None
) -> Float[Tensor, "g n d"]:
    """The contexts `c` of the targets in float32: conditional and, when `guided`, null.

    Args:
        noise: what the targets start from, of a network that draws them jointly.
    """
    tokens, visible, targets, given, groups = inputs
    conditions = [model.embed(given), *([model.null_condition(len(given))] if guided else [])]
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=autocast):
        contexts, _ = model.advance(model.start(*conditions), tokens, visible, targets, groups, noise)
    return contexts.float()


def student_tokens(
    student: MAR, draw: DrawTokens, inputs: Inputs, w: Guidance, z: Float[Tensor, "n c"], autocast: bool
) -> tuple[Float[Tensor, "n c"], Float[Tensor, "1 n d"]]:
    """`x_0 = g_theta(z, c_theta, w)`, one AR iteration, all targets at once; and `c_theta`."""
    noise = draw.joint_noise(z.unflatten(0, inputs.targets.shape)[None]) if student.config.joint_draw else None
    c_theta = target_contexts(student, inputs, guided=False, autocast=autocast, noise=noise)
    return draw(student.head, c_theta, w, z[None]), c_theta


def energy_scores(
    teacher: tuple[Draw, Float[Tensor, "g n d"]],
    student: tuple[Draw, Float[Tensor, "1 n d"]],
    w: Guidance,
    noise: EnergyDraws,
    images: int,
) -> Float[Tensor, " k"]:
    """The energy score of the student's draws for one of the teacher's chain, at the first targets of each image.

    Args:
        teacher: its way to draw, and its contexts of all targets.
        student: the same of the student.
    """
    (chain, c), (draw, c_theta) = teacher, student
    samples, count = len(noise.student), noise.student.shape[1] // images

    def first(x: Tensor) -> Tensor:
        return x.unflatten(-2, (images, -1))[..., :count, :].flatten(-3, -2)

    own = first(w[:, None])[:, 0] if isinstance(w, Tensor) else w
    with torch.no_grad():
        y = chain(first(c), own, noise.teacher)
    repeated = own.repeat(samples) if isinstance(own, Tensor) else own
    x = draw(first(c_theta).repeat(1, samples, 1), repeated, noise.student.flatten(0, 1)[None])
    return energy_score(x.unflatten(0, (samples, -1)), y)


def predicted_eps(
    head: TokenHead,
    x_t: Float[Tensor, "n c"],
    t: Int[Tensor, " n"],
    contexts: Float[Tensor, "g n d"],
    guidance: Guidance = 1.0,
) -> Float[Tensor, "n c"]:
    """`eps_w(x_t, t, c)`, differentiable in `x_t`: guided where there is a null context, or by a head that takes w."""
    if len(contexts) == 1:
        return head(x_t, t.float(), contexts[0], guidance)[:, : head.token_dim]
    embedded = head.embed_context(contexts) + head.embed_time(t.float())
    return guided_eps(head.denoise(x_t, embedded)[..., : head.token_dim], guidance)


def student_loss(
    heads: tuple[TokenHead, TokenHead], schedule: NoiseSchedule, x_0: Float[Tensor, "n c"], levels: NoiseLevels,
    contexts: Float[Tensor, "g n d"], w: Guidance, objective: Objective,
) -> tuple[Float[Tensor, ""], Float[Tensor, " n"], Float[Tensor, " n"]]:  # fmt: skip
    """`theta_loss` at the student's tokens and noise of some `levels`; the input x_t of both heads is not detached.

    Args:
        heads: the one whose score is the target, guided where there is a null context, and phi.
    """
    score, phi = heads
    t, eps = levels
    x_t = schedule.add_noise(x_0, eps, t)
    target_eps = predicted_eps(score, x_t, t, contexts, w)
    return theta_loss(objective, target_eps, predicted_eps(phi, x_t, t, contexts[:1], w), eps)


def phi_steps(
    phi: TokenHead, optimizer: Optimizer, drawn: Sequence[DrawnPart], schedule: NoiseSchedule, learning_rate: float
) -> Figures:
    """Let phi learn the student's own score, in a few updates on the tokens that it just drew; figures to log."""
    figures: Figures = {}
    phi.requires_grad_(True)
    for i in range(len(drawn[0][-1])):
        figures["auxiliary_loss"] = 0.0
        for share, contexts, w, x_0, levels in drawn:
            t, eps = levels[i]
            loss = phi_loss(predicted_eps(phi, schedule.add_noise(x_0, eps, t), t, contexts, w), eps)
            (loss * share).backward()
            add_means(figures, share, auxiliary_loss=loss)
        figures["auxiliary_gradient_norm"] = optimizer.step(learning_rate)
    phi.requires_grad_(False)
    return figures


def copy_networks(
    teacher: MAR, config: ModelConfig, settings: DistillConfig, workers: Workers
) -> tuple[MAR, MAR, MAR, TokenHead, dict[str, Optimizer]]:
    """Copy theta (the student), its average and phi from the teacher, freeze all but theta, and put all in place."""
    workers.parts(settings.batch_size, settings.accumulate)  # refuses a batch that cannot be split
    student = copy.deepcopy(teacher)
    student.config = config.mar
    if config.mar.guidance_range is not None:
        student.head.take_guidance(config.mar.guidance_range)
    ema, phi = copy.deepcopy(student), copy.deepcopy(student.head)
    teacher = cast_frozen(teacher) if settings.autocast and not workers.sharded else teacher
    for network, learns in ((teacher, False), (student, True), (ema, False), (phi, True)):
        # eval: dropout stays off. The average draws the probe's images in float32.
        workers.place(network.eval().requires_grad_(learns), settings.autocast and network is not ema)
    student.checkpoint_blocks = settings.checkpoint_blocks
    for network in (teacher, student, phi) if settings.compile else ():
        compile_blocks(network)
    adams = {"student": Optimizer(student, workers, settings.gradient_clip, (0.0, 0.999))}
    if config.mar.cached:
        adams["contexts"] = Optimizer(student, workers, settings.gradient_clip, (0.9, 0.99))
    adams["auxiliary"] = Optimizer(phi, workers, settings.gradient_clip, (0.0, 0.999))
    phi.requires_grad_(False)  # but in `phi_steps`
    return teacher, student, ema, phi, adams


def distill(
    teacher: MAR, teacher_config: ModelConfig, settings: DistillConfig, data: TrainingData, run: Run,
    probe: Probe | None = None,
) -> int:  # fmt: skip
    """Distil `teacher` into a one-step student, leave its EMA in the run's `model`, and return the last update.

    Args:
        probe: figures of a model, logged every `settings.probe_every` updates (a small Fréchet distance).

    Raises:
        ValueError: the teacher is a student, the run has other settings, or gradients are not finite again and again.
    """
    config, settings = student_config(teacher_config, settings)
    origin = {"data_set": data_identity(data), "teacher": model_identity(teacher_config.name, teacher)}
    workers, device, autocast = run.workers, run.workers.device, settings.autocast
    teacher, student, ema, phi, adams = copy_networks(teacher, config, settings, workers)
    described = {**config.to_dict(), **dataclasses.asdict(settings), **origin}
    state = State(run, described, {"student": student, "auxiliary": phi, "ema": ema}, adams)
    start, _ = state.load()
    flops, batch_size = gsim_flops(teacher, settings), settings.batch_size
    log = Log(run.folder / LOG, workers, start, settings.updates, batch_size, run.tensorboard, flops)
    space, schedule, draw = token_space(config.space, device), NoiseSchedule.full(device), draw_function(config, device)
    loader = Loader(data, settings, space, workers)
    chained = Pipeline(teacher, teacher_config, space).with_draw(diffusion_steps=settings.energy_steps)
    chain = draw_function(chained.config, device)

    for update in workers.updates(start, settings.updates):
        # Below 0 phi learns, and a student with a cache to give its teacher's contexts.
        student_update = update - settings.warmup
        factor = learning_rate_factor(max(student_update, 0), 1, settings.decay, settings.updates - settings.warmup)
        figures, drawn = Figures(), list[DrawnPart]()
        with fast_products(device):
            for share, w, inputs, part in masked_parts(update, settings, config, loader, workers):
                with torch.no_grad():
                    c = target_contexts(teacher, inputs, guided=is_guided(w), autocast=autocast)
                with torch.set_grad_enabled(student_update >= 0 or settings.cached):
                    x_0, c_theta = student_tokens(student, draw, inputs, w, part.z, autocast)
                if student_update >= 0:
                    heads = teacher.head, phi
                    loss, l1, l2 = student_loss(heads, schedule, x_0, part.theta, c, w, settings.objective)
                    add_means(figures, share, l1=l1, l2=l2)
                    if part.energy is not None:
                        drawn_by = (chain.bind(teacher.head), c), (draw.bind(student.head), c_theta)
                        scores = energy_scores(*drawn_by, w, part.energy, len(inputs.tokens))
                        loss = loss + settings.energy * scores.mean()
                        add_means(figures, share, energy=scores)
                    (loss * share).backward()
                elif settings.cached:
                    loss = F.mse_loss(c_theta, c[:1])
                    (loss * share).backward()
                    add_means(figures, share, context=loss)
                add_means(figures, share, token_square=x_0.square(), real_square=inputs.tokens.square())
                drawn.append((share, c[:1], w, x_0.detach(), part.phi))
            if student_update >= 0 or settings.cached:
                adam = adams["student" if student_update >= 0 else "contexts"]
                figures["gradient_norm"] = adam.step(settings.learning_rate * factor)
                update_ema(ema, student, max(student_update, 0), settings.ema_decay)
            rate = settings.auxiliary_learning_rate * factor
            figures |= phi_steps(phi, adams["auxiliary"], drawn, schedule, rate)

        now = due(update + 1, settings, workers, 0 if probe is None else settings.probe_every)
        if probe is not None and now.probe:
            figures |= probe(Pipeline(ema, config, space))
        if now.log:
            log(now.update, figures, list(adams.values()))
        if now.save:
            state.save(now.update, model=config)
        if now.last:
            state.wait()
            return now.update
    return start
