"""MARVAL-RL: a reward's gradient through the whole K-iteration image; one flat loop (MARVAL, stage 2)."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from marval.config import DistillConfig, FinetuneConfig, ModelConfig, OneStep
from marval.data import ImageData, batch_indices
from marval.io.checkpoint import save_model
from marval.model import MAR, NoiseSchedule
from marval.objectives.policy import policy_loss
from marval.pipeline import Pipeline
from marval.randomness import generator
from marval.rewards import Reward
from marval.sampling import DrawInOneStep, sample
from marval.spaces import token_space
from marval.train.distill import auxiliary_step_loss, guide, masked_batch, student_step_loss, student_tokens
from marval.train.run import LOG, Log, fast_attention, load_state, prepare_folder, save_state, update_ema


class Keeper:
    """Watches held-out figures: which model was best, and when to stop.

    A model counts when its Fréchet distance and its diversity stay within the settings' ratios of the
    student's; the best is the one with the highest held-out reward.
    """

    def __init__(self, settings: FinetuneConfig):
        self.settings = settings
        self.first: dict[str, float] = {}
        self.best, self.stale, self.stopped = float("-inf"), 0, ""

    def see(self, figures: dict[str, float]) -> bool:
        """Take a probe's figures; True when this model is the best so far."""
        self.first = self.first or figures
        fd, diversity = figures["fd"] / self.first["fd"], figures["diversity"] / self.first["diversity"]
        if fd > self.settings.max_distance_ratio:
            self.stopped = f"the Fréchet distance rose to {fd:.2f} times the student's"
        elif diversity < self.settings.min_diversity_ratio:
            self.stopped = f"the diversity fell to {diversity:.2f} times the student's"
        elif figures["log_probability"] > self.best:
            self.best, self.stale = figures["log_probability"], 0
            return True
        else:
            self.stale += 1
            if self.stale >= self.settings.patience:
                self.stopped = f"the held-out reward did not rise in {self.stale} probes"
        return False

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs."""
        return {"first": self.first, "best": self.best, "stale": self.stale, "stopped": self.stopped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.__dict__.update(state)


@dataclasses.dataclass(frozen=True)
class Anchor:
    """What the GSIM loss needs beside the student, to hold it near the teacher."""

    teacher: MAR
    data: ImageData
    settings: DistillConfig


def finetune(
    student: MAR,
    student_config: ModelConfig,
    reward: Reward,
    settings: FinetuneConfig,
    out: Path,
    *,
    probe: Callable[[Pipeline], dict[str, float]],
    anchor: Anchor | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> str:
    """Tune a student with `reward`, leave the best model in `out/model`, and say why tuning ended.

    Args:
        probe: held-out figures of a model (`fd`, `diversity`, `log_probability`), on fixed seeds.
        anchor: the teacher and data of the GSIM term; needed when `settings.anchor` is not 0.

    Raises:
        ValueError: the model is a teacher, `out` holds another run, an anchor without a teacher, or a bad reward.
    """
    if not isinstance(student_config.draw, OneStep):
        raise ValueError(f"{student_config.name or 'this model'} is a teacher: distil it first (marval distill)")
    if settings.anchor and anchor is None:
        raise ValueError("the GSIM anchor needs the teacher: name it with --teacher")
    prepare_folder(out, resume)
    device = student.mask_token.device
    config = dataclasses.replace(student_config, name=settings.name, iterations=settings.sample_iterations)
    described = {**config.to_dict(), "source": "", **dataclasses.asdict(settings)}
    space, schedule, draw = (
        token_space(config.space, device),
        NoiseSchedule.full(device),
        DrawInOneStep(student_config.draw),
    )
    ema = copy.deepcopy(student).eval().requires_grad_(False)
    student = copy.deepcopy(student).eval()
    trained = student.head if settings.train == "head" else student
    trained.requires_grad_(True)
    auxiliary = copy.deepcopy(anchor.teacher.head if anchor else student.head).requires_grad_(True)
    keeper = Keeper(settings)
    optimizer = torch.optim.Adam(trained.parameters(), settings.learning_rate, fused=True)
    auxiliary_optimizer = torch.optim.Adam(auxiliary.parameters(), 2e-4, (0.0, 0.999), fused=True)
    parts = {
        "student": student, "auxiliary": auxiliary, "ema": ema, "keeper": keeper,
        "optimizer": optimizer, "auxiliary_optimizer": auxiliary_optimizer,
    }  # fmt: skip
    start = load_state(out, described, **parts) if resume else 0
    log = Log(out / LOG, start, settings.iterations, settings.batch_size, quiet)
    if start == 0:
        keeper.see(probe(Pipeline(ema, config, space)))
        save_model(out / "model", ema, config)
        log(0, **keeper.first)

    warmup = settings.anchor_warmup if settings.anchor else 0
    for step in range(start, settings.iterations):
        if keeper.stopped:
            break
        rng = generator(settings.seed, "finetune", step)
        labels = torch.randint(len(config.class_names), (settings.batch_size,), generator=rng)
        seeds = torch.randint(2**62, (settings.batch_size,), generator=rng).tolist()
        loss = torch.zeros((), device=device)
        with fast_attention(device):
            if anchor and settings.anchor:
                indices = batch_indices(len(anchor.data), anchor.settings.batch_size, step, settings.seed)
                images, real_labels = anchor.data.batch(indices)
                tokens = space.encode(images.to(device))
                batch = masked_batch(tokens, real_labels.to(device), anchor.settings, rng)
                guided = guide(anchor.teacher, batch, anchor.settings)
                x_0 = student_tokens(student, draw, batch, anchor.settings)
                for _ in range(anchor.settings.auxiliary_steps):
                    auxiliary_step_loss(x_0.detach(), guided, auxiliary, schedule, rng).backward()
                    auxiliary_optimizer.step()
                    auxiliary_optimizer.zero_grad()
                if step < warmup:
                    continue
                auxiliary.requires_grad_(False)
                anchor_loss, _ = student_step_loss(x_0, guided, auxiliary, schedule, anchor.settings, rng)
                auxiliary.requires_grad_(True)
                loss = loss + settings.anchor * anchor_loss

            tokens = sample(
                student, draw, labels.to(device), iterations=settings.sample_iterations, seeds=seeds,
                gradient_iterations=settings.backprop_iterations,
            )  # fmt: skip
            prompts = [settings.prompt.format(config.class_names[label]) for label in labels.tolist()]
            tuned, rewards = policy_loss(reward, space.decode(tokens), prompts)
            (loss + tuned).backward()
            norm = torch.nn.utils.clip_grad_norm_(trained.parameters(), settings.gradient_clip)
            optimizer.step()
            optimizer.zero_grad()
            update_ema(ema, student, step - warmup, settings.ema_decay)

        done = step + 1
        saving = done % settings.save_every == 0 or done == settings.iterations
        probing = done % settings.probe_every == 0 or done == settings.iterations
        if saving or probing or done % settings.log_every == 0:  # figures are checked before anything is saved
            figures = {"reward": rewards.mean().item(), "gradient_norm": norm.item()}
            if probing:
                figures |= probe(Pipeline(ema, config, space))
            log(done, **figures)
            if probing and keeper.see(figures):
                save_model(out / "model", ema, config)
        if saving:
            save_state(out, done, described, **parts)
    return keeper.stopped or f"all {settings.iterations} iterations done"
