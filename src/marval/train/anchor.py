"""The anchor of tuning: a GSIM loss that holds the student to what it was distilled to."""

import copy
import dataclasses
from dataclasses import dataclass

import torch

from marval.config import Chain, ModelConfig, OneStep
from marval.data import TrainingData
from marval.losses.gsim import theta_loss
from marval.model import MAR, NoiseSchedule, TokenHead
from marval.pipeline import Pipeline
from marval.presets import DistillConfig, TuneConfig
from marval.runtime.distributed import Workers
from marval.runtime.log import Figures, add_means
from marval.runtime.optim import Optimizer
from marval.sampling import draw_function
from marval.spaces import TokenSpace
from marval.train.distill import (
    Drawn,
    masked_parts,
    phi_steps,
    predicted_eps,
    student_tokens,
    target_contexts,
)


@dataclass(frozen=True)
class Anchor:
    """What the anchor needs beside the student: its teacher, training data and settings of distillation."""

    teacher: MAR
    data: TrainingData
    settings: DistillConfig


def anchor_settings(recipe: DistillConfig, student: ModelConfig, settings: TuneConfig) -> DistillConfig:
    """The anchor's settings: masks, tokens and phi as in the recipe of distillation; w and K the student's own.

    It pulls to where the student was distilled to, in batches, parts and precision of the tuning that it is part of.

    Raises:
        ValueError: the model is no student.
    """
    if not isinstance(student.draw, OneStep):
        raise ValueError(f"{student.name or 'this model'} is a teacher: distil it first (marval distill)")
    return dataclasses.replace(
        recipe, guidance=student.draw.guidance, guidance_schedule=student.draw.guidance_schedule,
        iterations=student.iterations, batch_size=settings.batch_size, accumulate=settings.accumulate,
        gradient_clip=settings.gradient_clip, autocast=settings.autocast, seed=settings.seed,
    )  # fmt: skip


def anchor_of(
    guide: Pipeline, student: Pipeline, data: TrainingData, recipe: DistillConfig, settings: TuneConfig
) -> Anchor:
    """The anchor of tuning: the student's teacher, its training data, and the settings that it was distilled with.

    Raises:
        ValueError: the model is no student, or the guide is one, or has other sizes, tokens or classes.
    """
    name = guide.config.name
    if not isinstance(guide.config.draw, Chain):
        raise ValueError(f"--teacher {name}: this is a one-step student; expected the teacher it came from")
    forms = [
        (c.mar, c.class_names, c.space.token_dim, c.space.shift, c.space.scale) for c in (guide.config, student.config)
    ]
    if forms[0] != forms[1]:
        raise ValueError(
            f"--teacher {name}: {student.config.name} has other sizes, tokens or classes; expected its teacher"
        )
    return Anchor(guide.model, data, anchor_settings(recipe, student.config, settings))


@dataclass(frozen=True)
class AnchorNetworks:
    """The anchor's networks in place, and what its loss asks of the data.

    With a `reference` the student is held to its own first self, not to the teacher, by the gap between two scores
    (DI*, Luo et al. 2024, arXiv 2410.20898): phi's, which follows it, and a copy of phi as it was when the student
    began to learn. A one-step student has no score of its own; the teacher still gives contexts, without guidance.
    """

    anchor: Anchor
    config: ModelConfig
    phi: TokenHead
    phi_adam: Optimizer
    reference: TokenHead | None
    space: TokenSpace
    workers: Workers

    @property
    def named(self) -> dict[str, torch.nn.Module]:
        """The networks that a resumed run needs."""
        return {"auxiliary": self.phi, **({} if self.reference is None else {"reference": self.reference})}


def place_anchor(
    anchor: Anchor, config: ModelConfig, space: TokenSpace, workers: Workers, *, to_student: bool
) -> AnchorNetworks:
    """Put the anchor's networks in place; the teacher is taken over as it is, for it may be large."""
    if to_student:
        unguided = dataclasses.replace(anchor.settings, guidance=1.0, guidance_schedule="constant")
        anchor = dataclasses.replace(anchor, settings=unguided)
    phi, reference = (copy.deepcopy(anchor.teacher.head).eval() for _ in range(2))
    for network, learns in ((anchor.teacher.eval(), False), (phi, True), (reference, False)):
        workers.place(network.requires_grad_(learns))
    phi_adam = Optimizer(phi, anchor.settings.gradient_clip, (0.0, 0.999))
    phi.requires_grad_(False)  # but in its own steps
    return AnchorNetworks(anchor, config, phi, phi_adam, reference if to_student else None, space, workers)


def anchor_step(anchored: AnchorNetworks, student: MAR, update: int, weight: float, student_update: int) -> Figures:
    """Leave `weight` times the gradients of the GSIM loss in the student, let phi follow it, and return the figures.

    `marval.train.distill` says what each line is.

    Args:
        student_update: counts the student's own updates. Below 0 the student only draws, so that phi can catch up; at
            0 the reference becomes what phi is then.
    """
    teacher, data, settings = anchored.anchor.teacher, anchored.anchor.data, anchored.anchor.settings
    phi, mar, workers = anchored.phi, anchored.config.mar, anchored.workers
    schedule, draw = NoiseSchedule.full(workers.device), draw_function(anchored.config, workers.device)
    if anchored.reference is not None and student_update == 0:
        with torch.no_grad():
            torch._foreach_copy_(list(anchored.reference.parameters()), list(phi.parameters()))
    score = teacher.head if anchored.reference is None else anchored.reference
    figures, drawn = Figures(), list[Drawn]()
    for share, w, inputs, part in masked_parts(update, settings, mar, data, anchored.space, workers):
        with torch.no_grad():
            c = target_contexts(teacher, inputs, guided=w != 1.0, autocast=settings.autocast)
        with torch.set_grad_enabled(student_update >= 0):
            x_0 = student_tokens(student, draw, inputs, part.z, settings.autocast)
        if student_update >= 0:
            t, eps = part.theta
            x_t = schedule.add_noise(x_0, eps, t)
            target_eps, phi_eps = predicted_eps(score, x_t, t, c, w), predicted_eps(phi, x_t, t, c[:1])
            loss, l1, l2 = theta_loss(settings.objective, target_eps, phi_eps, eps)
            (loss * weight * share).backward()
            add_means(figures, share, l1=l1, l2=l2)
        drawn.append(Drawn(share, c[:1], x_0.detach(), part.phi))
    return figures | phi_steps(phi, anchored.phi_adam, drawn, schedule, settings.auxiliary_learning_rate)
