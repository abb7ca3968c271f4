"""GSIM distillation: teacher, student and auxiliary network; one flat loop (MARVAL, stage 1)."""

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from marval.config import Chain, MARConfig, ModelConfig, OneStep, Schedule
from marval.data import TrainingData, batch_indices
from marval.losses.gsim import Objective, Terms, auxiliary_loss, generator_loss
from marval.model import MAR, NoiseSchedule, TokenHead
from marval.model.diffusion import NUM_TIMESTEPS
from marval.pipeline import Pipeline
from marval.presets import DistillConfig
from marval.runtime.distributed import Workers
from marval.runtime.folder import claims_folder, data_identity, model_identity
from marval.runtime.log import LOG, Log
from marval.runtime.optim import Updates, fast_attention, learning_rate_factor, update_ema
from marval.runtime.rng import generator
from marval.runtime.state import load_state, save_network, save_state, state_tensors
from marval.sampling import DrawTokens, draw_function, guidance_at, guided_eps, model_contexts
from marval.spaces import token_space
from marval.train.draws import hidden_positions, noise_levels

THETA_LEVELS = (20, 980)
PHI_LEVELS = (0, NUM_TIMESTEPS - 1)


@dataclass(frozen=True)
class Masking:
    """What is hidden of every image of a batch, which hidden tokens are drawn, and the student's noise for them."""

    visible: Int[Tensor, "b v"]
    targets: Int[Tensor, "b q"]
    z: Float[Tensor, "b q c"]

    def rows(self, rows: slice, device: torch.device) -> "Masking":
        """Some images' part, on the device."""
        return Masking(*(x[rows].to(device, non_blocking=True) for x in (self.visible, self.targets, self.z)))


@dataclass(frozen=True)
class Batch:
    """Masked real images: what every network of one step is asked about."""

    tokens: Float[Tensor, "b l c"]
    labels: Int[Tensor, " b"]
    masking: Masking

    @property
    def context_inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens, visible positions, target positions and labels, as `model_contexts` takes them."""
        return self.tokens, self.masking.visible, self.masking.targets, self.labels


@dataclass(frozen=True)
class Guided:
    """The frozen, guided teacher in one batch's context."""

    head: TokenHead
    contexts: Float[Tensor, "g n d"]  # conditional and, with guidance, null
    guidance: float

    def eps(self, x_t: Float[Tensor, "n c"], t: Int[Tensor, " n"]) -> Float[Tensor, "n c"]:
        """`eps_w(x_t, t)`; differentiable in `x_t`."""
        embedded = self.head.embed_context(self.contexts) + self.head.embed_time(t.float())
        return guided_eps(self.head.denoise(x_t, embedded)[..., : self.head.token_dim], self.guidance)


def hide_tokens(mar: MARConfig, settings: DistillConfig, rng: torch.Generator) -> Masking:
    """Hide a random part of every image (one ratio for the batch) and choose the tokens to draw."""
    visible, targets = hidden_positions(mar.num_tokens, settings, rng)
    return Masking(visible, targets, torch.randn(*targets.shape, mar.token_dim, generator=rng))


def revealed_after(visible: int, tokens: int, iterations: int) -> float:
    """The fraction that is revealed once the targets are drawn: what w depends on, as in the sampler.

    A training context has no iteration k, but its masked fraction m places it on the cosine schedule of K iterations,
    m = cos(pi/2 k/K); one iteration later that is

        revealed = 1 - cos(min(pi/2, arccos(m) + pi/(2K))),    at most (L - 1) / L as in MAR.
    """
    masked = 1 - visible / tokens
    angle = min(math.pi / 2, math.acos(masked) + math.pi / (2 * iterations))
    return min(1 - math.cos(angle), (tokens - 1) / tokens)


def guidance_of(settings: DistillConfig) -> tuple[float, Schedule]:
    """w and its schedule.

    Raises:
        ValueError: the settings leave them to a teacher.
    """
    if settings.guidance is None or settings.guidance_schedule is None:
        raise ValueError("settings without guidance: take the teacher's with `with_guidance_of`")
    return settings.guidance, settings.guidance_schedule


@torch.no_grad()
def guide(teacher: MAR, batch: Batch, settings: DistillConfig) -> Guided:
    """The teacher's contexts for a batch and its guidance there."""
    revealed = revealed_after(batch.masking.visible.shape[1], batch.tokens.shape[1], settings.iterations)
    guidance = guidance_at(*guidance_of(settings), revealed)
    with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=settings.autocast):
        contexts = model_contexts(teacher, *batch.context_inputs, guided=guidance != 1.0)
    return Guided(teacher.head, contexts.float(), guidance)


def student_tokens(student: MAR, draw: DrawTokens, batch: Batch, settings: DistillConfig) -> Float[Tensor, "n c"]:
    """`x_0 = g_theta(z, c_theta)`: one AR iteration, all targets at once."""
    with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=settings.autocast):
        context = model_contexts(student, *batch.context_inputs, guided=False)
    return draw(student.head, context[0].float(), None, 1.0, batch.masking.z.flatten(0, 1)[None])


def student_step_loss(
    x_0: Float[Tensor, "n c"],
    guided: Guided,
    auxiliary: TokenHead,
    schedule: NoiseSchedule,
    objective: Objective,
    t: Int[Tensor, " n"],
    eps: Float[Tensor, "n c"],
) -> tuple[Float[Tensor, ""], Terms]:
    """The generator's loss at the levels `t`; teacher and phi are frozen, their input is not."""
    x_t = schedule.add_noise(x_0, eps, t)
    auxiliary_eps = auxiliary(x_t, t.float(), guided.contexts[0])[:, : auxiliary.token_dim]
    return generator_loss(objective, guided.eps(x_t, t), auxiliary_eps, eps, x_t)


def auxiliary_step_loss(
    x_0: Float[Tensor, "n c"],
    guided: Guided,
    auxiliary: TokenHead,
    schedule: NoiseSchedule,
    t: Int[Tensor, " n"],
    eps: Float[Tensor, "n c"],
) -> Float[Tensor, ""]:
    """Phi's denoising loss on (detached) student samples at the levels `t`."""
    predicted = auxiliary(schedule.add_noise(x_0, eps, t), t.float(), guided.contexts[0])
    return auxiliary_loss(predicted[:, : auxiliary.token_dim], eps)


def flat_rows(
    levels: tuple[Int[Tensor, "b q"], Float[Tensor, "b q c"]], rows: slice, device: torch.device
) -> tuple[Int[Tensor, " n"], Float[Tensor, "n c"]]:
    """Some images' levels and noise, flattened over images and targets, on the device."""
    t, eps = levels
    return t[rows].flatten().to(device), eps[rows].flatten(0, 1).to(device)


class GSIM:
    """The GSIM loss for a student: frozen teacher, auxiliary network, and the real images that give contexts.

    The teacher is taken over as it is: frozen and, among several processes, sharded.

    A step is `backward` (gradients for the student, to be used by the caller), then `update_auxiliary`.

    With `to_student` the student is held to its own first self, not to the teacher, by the gap between two scores (DI*,
    Luo et al. 2024, arXiv 2410.20898): phi's, which follows it, and a copy of phi that `freeze_reference` keeps. A
    one-step student has no score of its own; the teacher still gives contexts, without guidance.
    """

    masking: Masking  # of the last `backward`
    drawn: list[tuple[slice, Guided, Tensor]]  # its parts: rows, the guided teacher there, and the student's tokens

    def __init__(
        self,
        teacher: MAR,
        config: ModelConfig,
        settings: DistillConfig,
        data: TrainingData,
        workers: Workers,
        *,
        to_student: bool = False,
    ):
        if to_student:
            settings = dataclasses.replace(settings, guidance=1.0, guidance_schedule="constant")
        self.config, self.settings, self.data, self.workers = config, settings, data, workers
        auxiliary = copy.deepcopy(teacher.head).eval().requires_grad_(True)
        reference = copy.deepcopy(teacher.head).eval().requires_grad_(False) if to_student else None
        self.teacher = workers.place(teacher.eval().requires_grad_(False))  # not a copy: it may be large
        self.auxiliary = workers.place(auxiliary)
        self.reference = None if reference is None else workers.place(reference)
        self.update = Updates(self.auxiliary, settings, (0.0, 0.999))
        self.space, self.schedule = token_space(config.space, workers.device), NoiseSchedule.full(workers.device)
        self.draw = draw_function(config)
        self.parts = workers.parts(settings.batch_size, settings.accumulate)

    def backward(
        self, student: MAR, step: int, rng: torch.Generator, *, learning: bool, weight: float = 1.0
    ) -> dict[str, Tensor | float]:
        """Draw the targets of step `step` with the student and leave `weight` times the loss's gradients in it.

        Without `learning` the student only draws, so that phi can catch up. Returns the figures to log.
        """
        settings, device = self.settings, self.workers.device
        indices = batch_indices(len(self.data), settings.batch_size, step, settings.seed)
        self.masking = hide_tokens(self.config.mar, settings, rng)
        levels = noise_levels(self.masking.z.shape, *THETA_LEVELS, rng) if learning else None
        self.drawn = []
        figures: dict[str, Tensor | float] = {}
        self.auxiliary.requires_grad_(False)
        for rows in self.parts:
            real = self.data.tokens(indices, rows, self.space, device, (settings.seed, "data", step))
            batch = Batch(*real, self.masking.rows(rows, device))
            guided = guide(self.teacher, batch, settings)
            with torch.set_grad_enabled(learning):
                x_0 = student_tokens(student, self.draw, batch, settings)
            if levels is not None:
                t, eps = flat_rows(levels, rows, device)
                target = guided if self.reference is None else dataclasses.replace(guided, head=self.reference)
                loss, terms = student_step_loss(x_0, target, self.auxiliary, self.schedule, settings.objective, t, eps)
                (loss * weight * self.workers.share(rows, settings.batch_size)).backward()
                self._add(figures, rows, {"l1": terms.l1, "l2": terms.l2})
            self.drawn.append((rows, guided, x_0.detach()))
            self._add(figures, rows, {"token_mean": x_0, "token_square": x_0.square()})
            self._add(figures, rows, {"real_mean": batch.tokens, "real_square": batch.tokens.square()})
        self.auxiliary.requires_grad_(True)
        return figures

    @torch.no_grad()
    def freeze_reference(self) -> None:
        """Keep phi as it is now, having learnt the untouched student's score, as what the student is held to."""
        if self.reference is not None:
            for kept, parameter in zip(self.reference.parameters(), self.auxiliary.parameters(), strict=True):
                kept.copy_(parameter)

    def update_auxiliary(self, rng: torch.Generator, factor: float = 1.0) -> dict[str, Tensor | float]:
        """Phi learns the tokens that `backward` drew, in `settings.auxiliary_steps` updates; figures to log.

        `factor` scales its learning rate.
        """
        for _ in range(self.settings.auxiliary_steps):
            figures: dict[str, Tensor | float] = {}
            levels = noise_levels(self.masking.z.shape, *PHI_LEVELS, rng)
            for rows, guided, x_0 in self.drawn:
                t, eps = flat_rows(levels, rows, self.workers.device)
                loss = auxiliary_step_loss(x_0, guided, self.auxiliary, self.schedule, t, eps)
                (loss * self.workers.share(rows, self.settings.batch_size)).backward()
                self._add(figures, rows, {"auxiliary_loss": loss})
            norm = self.update(self.settings.auxiliary_learning_rate * factor)
        return {**figures, "auxiliary_gradient_norm": norm}

    def _add(self, figures: dict[str, Tensor | float], rows: slice, parts: dict[str, Tensor]) -> None:
        """Add a part's share of the batch's means."""
        share = self.workers.share(rows, self.settings.batch_size)
        for name, part in parts.items():
            figures[name] = figures.get(name, 0.0) + part.detach().mean() * share


@claims_folder
def distill(
    teacher: MAR,
    teacher_config: ModelConfig,
    settings: DistillConfig,
    data: TrainingData,
    out: Path,
    *,
    resume: bool = False,
    probe: Callable[[Pipeline], dict[str, float]] | None = None,
    workers: Workers | None = None,
    quiet: bool = False,
) -> int:
    """Distil `teacher` into a one-step student, leave its EMA in `out/model`, and return the last step.

    Args:
        probe: figures of a model, logged every `settings.probe_every` updates (a small Fréchet distance).
        workers: the processes that share the work; this one alone when None.

    Raises:
        ValueError: the teacher is a student already, `out` holds another run, or too many steps in a row had
            gradients that are not finite.
    """
    if not isinstance(teacher_config.draw, Chain):
        raise ValueError(f"{teacher_config.name or 'this model'} is a one-step student already: expected a teacher")
    workers = workers or Workers()
    settings = settings.with_guidance_of(teacher_config.draw).within(teacher_config.mar.num_tokens)
    one_step = OneStep(settings.timestep, teacher_config.draw.clip, *guidance_of(settings))
    config = dataclasses.replace(
        teacher_config, draw=one_step, name=settings.name, iterations=settings.iterations,
        order=settings.order,
    )  # fmt: skip
    described = {
        **config.to_dict(), "images": len(data), **dataclasses.asdict(settings), "data_set": data_identity(data),
        "teacher": model_identity(teacher_config.name, teacher),
    }  # fmt: skip
    student, ema = (copy.deepcopy(teacher).eval() for _ in range(2))  # dropout stays off
    gsim = GSIM(teacher, config, settings, data, workers)
    student, ema = workers.place(student.requires_grad_(True)), workers.place(ema.requires_grad_(False))
    student.checkpoint_blocks = settings.checkpoint_blocks
    update = Updates(student, settings, (0.0, 0.999))
    state = state_tensors(
        {"student": student, "auxiliary": gsim.auxiliary, "ema": ema}, {"student": update, "auxiliary": gsim.update}
    )
    start, _ = load_state(out, described, state, workers) if resume else (0, None)
    log = Log(out / LOG, start, settings.updates, settings.batch_size, quiet=quiet, workers=workers)

    for step in workers.steps(start, settings.updates):
        rng = generator(settings.seed, "distill", step)
        learnt = step - settings.warmup  # until then only phi learns
        factor = learning_rate_factor(max(learnt, 0), 1, settings.decay, settings.updates - settings.warmup)
        with fast_attention(workers.device):
            figures = gsim.backward(student, step, rng, learning=learnt >= 0)
            if learnt >= 0:
                figures["gradient_norm"] = update(settings.learning_rate * factor)
                update_ema(ema, student, learnt, settings.ema_decay)
            figures |= gsim.update_auxiliary(rng, factor)

        done = step + 1
        last = done == settings.updates or workers.stopping()
        saving = last or done % settings.save_every == 0
        probing = probe is not None and (done % settings.probe_every == 0 or done == settings.updates)
        if saving or probing or done % settings.log_every == 0:  # figures are checked before anything is saved
            if probe is not None and probing:
                figures |= probe(Pipeline(ema, config, gsim.space))
            log(done, figures, [update, gsim.update])
        if saving:
            save_network(out / "model", ema, config, workers)
            save_state(out, done, described, state, {}, workers)
        if last:
            return done
    return start
