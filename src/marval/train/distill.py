"""GSIM distillation: teacher, student and auxiliary network; one flat loop (MARVAL, stage 1)."""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from marval.config import Chain, DistillConfig, ModelConfig, OneStep
from marval.data import ImageData, batch_indices
from marval.io.checkpoint import save_model
from marval.model import MAR, NoiseSchedule, TokenHead
from marval.objectives.gsim import Terms, auxiliary_loss, generator_loss
from marval.pipeline import Pipeline
from marval.randomness import generator
from marval.sampling import DrawInOneStep, guidance_at, guided_eps, model_contexts
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
from marval.train.teacher import masked_count, split_tokens


@dataclass(frozen=True)
class Batch:
    """Masked real images: what every network of one step is asked about. N = images x target tokens."""

    tokens: Float[Tensor, "b l c"]
    labels: Int[Tensor, " b"]
    visible: Int[Tensor, "b v"]
    targets: Int[Tensor, "b q"]
    z: Float[Tensor, "n c"]  # the student's noise


@dataclass(frozen=True)
class Guided:
    """The frozen, guided teacher in one batch's context."""

    head: TokenHead
    contexts: Float[Tensor, "g n d"]  # conditional and, with guidance, null
    guidance: float

    def eps(self, x_t: Float[Tensor, "n c"], t: Int[Tensor, " n"]) -> Float[Tensor, "n c"]:
        """`eps_w(x_t, t)`; differentiable in `x_t`."""
        embedded = self.head.cond_embed(self.contexts) + self.head.time_embed(t.float())
        return guided_eps(self.head.denoise(x_t, embedded)[..., : self.head.token_dim], self.guidance)


def masked_batch(
    tokens: Float[Tensor, "b l c"],
    labels: Int[Tensor, " b"],
    settings: DistillConfig,
    rng: torch.Generator,
) -> Batch:
    """Hide a random part of every image (one ratio for the batch) and choose the tokens to draw."""
    batch, total, channels = tokens.shape
    masked = masked_count(total, settings.mask_ratio_min, settings.mask_ratio_std, rng)
    visible, targets = split_tokens(batch, total, masked, settings.tokens_per_image, rng)
    z = torch.randn(targets.numel(), channels, generator=rng)
    device = tokens.device
    return Batch(tokens, labels, visible.to(device), targets.to(device), z.to(device))


@torch.no_grad()
def guide(teacher: MAR, batch: Batch, settings: DistillConfig) -> Guided:
    """The teacher's contexts for a batch and its guidance there."""
    revealed = batch.visible.shape[1] / batch.tokens.shape[1]
    if settings.guidance is None or settings.guidance_schedule is None:
        raise ValueError("settings without guidance: take the teacher's with `with_guidance_of`")
    guidance = guidance_at(settings.guidance, settings.guidance_schedule, revealed)
    with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=settings.autocast):
        contexts = model_contexts(
            teacher, batch.tokens, batch.visible, batch.targets, batch.labels, guided=guidance != 1.0
        )
    return Guided(teacher.head, contexts.float(), guidance)


def student_tokens(student: MAR, draw: DrawInOneStep, batch: Batch, settings: DistillConfig) -> Float[Tensor, "n c"]:
    """`x_0 = g_theta(z, c_theta)`: one AR iteration, all targets at once."""
    with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=settings.autocast):
        context = model_contexts(student, batch.tokens, batch.visible, batch.targets, batch.labels, guided=False)
    return draw(student.head, context[0].float(), None, 1.0, batch.z[None])


def student_step_loss(
    x_0: Float[Tensor, "n c"],
    guided: Guided,
    auxiliary: TokenHead,
    schedule: NoiseSchedule,
    settings: DistillConfig,
    rng: torch.Generator,
) -> tuple[Float[Tensor, ""], Terms]:
    """The generator's loss at a random level t in [20, 980]; teacher and phi are frozen, their input is not."""
    t = torch.randint(20, 981, (len(x_0),), generator=rng).to(x_0.device)
    eps = torch.randn(x_0.shape, generator=rng).to(x_0.device)
    x_t = schedule.add_noise(x_0, eps, t)
    auxiliary_eps = auxiliary(x_t, t.float(), guided.contexts[0])[:, : auxiliary.token_dim]
    return generator_loss(settings.objective, guided.eps(x_t, t), auxiliary_eps, eps, x_t)


def auxiliary_step_loss(
    x_0: Float[Tensor, "n c"],
    guided: Guided,
    auxiliary: TokenHead,
    schedule: NoiseSchedule,
    rng: torch.Generator,
) -> Float[Tensor, ""]:
    """Phi's denoising loss on (detached) student samples at a random level t in [0, 999]."""
    t = torch.randint(0, len(schedule.timesteps), (len(x_0),), generator=rng).to(x_0.device)
    eps = torch.randn(x_0.shape, generator=rng).to(x_0.device)
    predicted = auxiliary(schedule.add_noise(x_0, eps, t), t.float(), guided.contexts[0])
    return auxiliary_loss(predicted[:, : auxiliary.token_dim], eps)


def distill(
    teacher: MAR,
    teacher_config: ModelConfig,
    settings: DistillConfig,
    data: ImageData,
    out: Path,
    *,
    resume: bool = False,
    probe: Callable[[Pipeline], dict[str, float]] | None = None,
    quiet: bool = False,
) -> None:
    """Distil `teacher` into a one-step student and leave its EMA in `out/model`.

    Args:
        probe: figures of a model, logged every `settings.probe_every` iterations (a small Fréchet distance).

    Raises:
        ValueError: the teacher is a student already, `out` holds another run, or a figure is no longer finite.
    """
    if not isinstance(teacher_config.draw, Chain):
        raise ValueError(f"{teacher_config.name or 'this model'} is a one-step student already: expected a teacher")
    settings = settings.with_guidance_of(teacher_config.draw)
    prepare_folder(out, resume)
    device = teacher.mask_token.device
    config = dataclasses.replace(
        teacher_config, draw=OneStep(settings.timestep), name=settings.name, iterations=settings.sample_iterations
    )
    described = {**config.to_dict(), "source": "", "images": len(data), **dataclasses.asdict(settings)}
    space, schedule, draw = (
        token_space(config.space, device),
        NoiseSchedule.full(device),
        DrawInOneStep(OneStep(settings.timestep)),
    )
    teacher.eval().requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)  # dropout stays off
    auxiliary = copy.deepcopy(teacher.head).requires_grad_(True)
    ema = copy.deepcopy(teacher)
    betas = (0.0, 0.999)
    student_optimizer = torch.optim.Adam(student.parameters(), settings.learning_rate, betas, fused=True)
    auxiliary_optimizer = torch.optim.Adam(auxiliary.parameters(), settings.auxiliary_learning_rate, betas, fused=True)
    parts = {
        "student": student, "auxiliary": auxiliary, "ema": ema,
        "student_optimizer": student_optimizer, "auxiliary_optimizer": auxiliary_optimizer,
    }  # fmt: skip
    start = load_state(out, described, **parts) if resume else 0
    log = Log(out / LOG, start, settings.iterations, settings.batch_size, quiet)

    for step in range(start, settings.iterations):
        rng = generator(settings.seed, "distill", step)
        images, labels = data.batch(batch_indices(len(data), settings.batch_size, step, settings.seed))
        tokens = space.encode(images.to(device))
        batch = masked_batch(tokens, labels.to(device), settings, rng)
        factor = learning_rate_factor(step - settings.warmup, 1, settings.decay, settings.iterations - settings.warmup)
        with fast_attention(device):
            guided = guide(teacher, batch, settings)
            x_0 = student_tokens(student, draw, batch, settings)

            if step >= settings.warmup:  # until then only phi learns
                auxiliary.requires_grad_(False)
                loss, terms = student_step_loss(x_0, guided, auxiliary, schedule, settings, rng)
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(student.parameters(), settings.gradient_clip)
                for group in student_optimizer.param_groups:
                    group["lr"] = settings.learning_rate * factor
                student_optimizer.step()
                student_optimizer.zero_grad()
                update_ema(ema, student, step - settings.warmup, settings.ema_decay)
                auxiliary.requires_grad_(True)

            for _ in range(settings.auxiliary_steps):
                phi_loss = auxiliary_step_loss(x_0.detach(), guided, auxiliary, schedule, rng)
                phi_loss.backward()
                phi_norm = torch.nn.utils.clip_grad_norm_(auxiliary.parameters(), settings.gradient_clip)
                auxiliary_optimizer.step()
                auxiliary_optimizer.zero_grad()

        done = step + 1
        saving = done % settings.save_every == 0 or done == settings.iterations
        probing = probe is not None and (done % settings.probe_every == 0 or done == settings.iterations)
        if saving or probing or done % settings.log_every == 0:  # figures are checked before anything is saved
            figures = {
                "auxiliary_loss": phi_loss.item(), "auxiliary_gradient_norm": phi_norm.item(),
                "token_mean": x_0.mean().item(), "token_std": x_0.std().item(),
                "real_mean": tokens.mean().item(), "real_std": tokens.std().item(),
            }  # fmt: skip
            if step >= settings.warmup:
                l1, l2 = terms.l1.mean().item(), terms.l2.mean().item()
                figures |= {"l1": l1, "l2": l2, "gradient_norm": norm.item()}
            if probe is not None and probing:
                figures |= probe(Pipeline(ema, config, space))
            log(done, **figures)
        if saving:
            save_state(out, done, described, **parts)
            save_model(out / "model", ema, config)
