"""The anchor of tuning: a GSIM loss that holds the student to what it was distilled to."""

import copy
import dataclasses
from dataclasses import dataclass

import torch

from marval.config import Chain, ModelConfig
from marval.data import TrainingData
from marval.data.loader import Loader
from marval.model import MAR, NoiseSchedule, TokenHead
from marval.pipeline import Pipeline
from marval.presets import AnchorTo, DistillConfig, TuneConfig
from marval.runtime.distributed import Workers
from marval.runtime.log import Figures, add_means
from marval.runtime.optim import Optimizer
from marval.sampling import draw_function
from marval.sampling.draw import is_guided
from marval.sampling.fast import cast_frozen, compile_blocks
from marval.spaces import TokenSpace
from marval.train.distill import (
    DrawnPart,
    masked_parts,
    phi_steps,
    student_loss,
    student_tokens,
    target_contexts,
)


@dataclass(frozen=True)
class Anchor:
    """What the anchor needs beside the student: its teacher, training data and settings of distillation.

    Masks, tokens and phi are as in the settings; w and K are the student's own.
    """

    teacher: MAR
    data: TrainingData
    settings: DistillConfig


def anchor_of(
    guide: Pipeline, student: Pipeline, data: TrainingData, recipe: DistillConfig, settings: TuneConfig
) -> Anchor:
    """The anchor of a student: by the recipe of its distillation, in batches, parts and precision of its tuning.

    Raises:
        ValueError: the guide is a student, or has other sizes, tokens or classes.
    """
    name, configs = guide.config.name, (guide.config, student.config)
    if not isinstance(guide.config.draw, Chain):
        raise ValueError(f"--teacher {name}: this is a one-step student; expected the teacher it came from")
    forms = [
        (
            dataclasses.replace(c.mar, guidance_range=None, cached=False, joint_draw=False),
            c.class_names,
            c.styles,
            c.space.token_dim,
            c.space.shift,
            c.space.scale,
        )
        for c in configs
    ]
    if forms[0] != forms[1]:
        raise ValueError(
            f"--teacher {name}: {student.config.name} has other sizes, tokens or classes; expected its teacher"
        )
    same = ("batch_size", "accumulate", "gradient_clip", "autocast", "compile", "seed")
    recipe = dataclasses.replace(recipe, energy=0.0, **{field: getattr(settings, field) for field in same})
    return Anchor(guide.model, data, recipe)


class AnchorLoss:
    """The anchor's loss, with its networks in place.

    `to="student"` holds the student to its own first self, not to the teacher, by the gap between two scores (DI*, Luo
    et al. 2024, arXiv 2410.20898): phi's, which follows it, and a copy of phi as it was when the student began to
    learn. A one-step student has no score of its own; the teacher still gives contexts, without guidance.
    """

    def __init__(self, anchor: Anchor, config: ModelConfig, space: TokenSpace, workers: Workers, to: AnchorTo):
        self.teacher, self.settings = anchor.teacher.eval(), anchor.settings
        self.loader = Loader(anchor.data, anchor.settings, space, workers)
        if self.settings.autocast and not workers.sharded:
            self.teacher = cast_frozen(self.teacher)
        self.config, self.workers = config, workers
        self.schedule, self.draw = NoiseSchedule.full(workers.device), draw_function(config, workers.device)
        self.phi = copy.deepcopy(self.teacher.head).eval()
        if config.mar.guidance_range is not None:
            self.phi.take_guidance(config.mar.guidance_range)
        reference = copy.deepcopy(self.phi)
        self.networks: dict[str, TokenHead] = {"auxiliary": self.phi}  # that a resumed run needs
        if to == "student":
            self.networks["reference"] = reference
        for network, learns in ((self.teacher, False), (self.phi, True), (reference, False)):
            workers.place(network.requires_grad_(learns), self.settings.autocast)
            if self.settings.compile:
                compile_blocks(network)
        self.phi_adam = Optimizer(self.phi, workers, self.settings.gradient_clip, (0.0, 0.999))
        self.phi.requires_grad_(False)  # but in its own steps

    def step(self, student: MAR, update: int, weight: float, student_update: int) -> Figures:
        """Leave `weight` times the gradients of the GSIM loss in the student, let phi follow it; figures to log.

        `marval.train.distill` says what each line is.

        Args:
            student_update: counts the student's own updates. Below 0 the student only draws, so that phi can catch
                up; at 0 the reference becomes what phi is then.
        """
        phi, settings, schedule, workers = self.phi, self.settings, self.schedule, self.workers
        score = self.networks.get("reference", self.teacher.head)
        if score is not self.teacher.head and student_update == 0:
            with torch.no_grad():
                torch._foreach_copy_(list(score.parameters()), list(phi.parameters()))
        figures, drawn = Figures(), list[DrawnPart]()
        for share, w, inputs, part in masked_parts(update, settings, self.config, self.loader, workers):
            with torch.no_grad():
                guided = score is self.teacher.head and is_guided(w)
                c = target_contexts(self.teacher, inputs, guided=guided, autocast=settings.autocast)
            with torch.set_grad_enabled(student_update >= 0):
                x_0, _ = student_tokens(student, self.draw, inputs, w, part.z, settings.autocast)
            if student_update >= 0:
                loss, l1, l2 = student_loss((score, phi), schedule, x_0, part.theta, c, w, settings.objective)
                (loss * weight * share).backward()
                add_means(figures, share, l1=l1, l2=l2)
            drawn.append((share, c[:1], w, x_0.detach(), part.phi))
        return figures | phi_steps(phi, self.phi_adam, drawn, schedule, settings.auxiliary_learning_rate)
