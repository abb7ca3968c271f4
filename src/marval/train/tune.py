"""MARVAL-RL: a reward's gradient through the whole K-iteration image; one flat loop (MARVAL, stage 2)."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from marval.config import ModelConfig, OneStep
from marval.data import TrainingData
from marval.losses.reward import policy_loss
from marval.model import MAR
from marval.pipeline import Pipeline
from marval.presets import DistillConfig, TuneConfig
from marval.rewards import Prompt, Reward, prompts_of, reward_identity, standardized
from marval.runtime.distributed import Workers
from marval.runtime.folder import claims_folder, data_identity, model_identity
from marval.runtime.log import LOG, Log
from marval.runtime.optim import Updates, fast_attention, update_ema
from marval.runtime.rng import generator
from marval.runtime.state import load_state, save_network, save_state, state_tensors
from marval.sampling import draw_function, sample
from marval.spaces import TokenSpace, token_space
from marval.train.distill import GSIM
from marval.train.low_rank import add_low_rank, merged

HELD_OUT = ("held_out", "log_probability")  # figures of which the best model has the highest; the first that is there


class Keeper:
    """Watches held-out figures: which model was best, and when to stop.

    A model counts when its Fréchet distance and its diversity stay within the settings' ratios of the student's. The
    best is the one with the highest held-out score: the mean of the held-out reward, else the log-probability that
    the held-out classifier gives; where there is neither, the latest that counts. A figure that could not be measured
    (no class with two images has no diversity) decides nothing.
    """

    def __init__(self, settings: TuneConfig):
        self.settings = settings
        self.first: dict[str, float] = {}
        self.best, self.stale, self.stopped = float("-inf"), 0, ""

    def see(self, figures: dict[str, float]) -> bool:
        """Take a probe's figures; True when this model is the best so far."""
        self.first = self.first or figures
        fd, diversity = (self._ratio(name, figures) for name in ("fd", "diversity"))
        score = next((figures[name] for name in HELD_OUT if name in figures), None)
        if fd is not None and fd > self.settings.max_distance_ratio:
            self.stopped = f"the Fréchet distance rose to {fd:.2f} times the student's"
        elif diversity is not None and diversity < self.settings.min_diversity_ratio:
            self.stopped = f"the diversity fell to {diversity:.2f} times the student's"
        elif score is None or score > self.best:
            self.best, self.stale = self.best if score is None else score, 0
            return True
        else:
            self.stale += 1
            if self.stale >= self.settings.patience:
                self.stopped = f"the held-out reward did not rise in {self.stale} probes"
        return False

    def _ratio(self, name: str, figures: dict[str, float]) -> float | None:
        """A figure over the student's; None where one of them is missing."""
        return figures[name] / self.first[name] if name in figures and self.first.get(name) else None

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs."""
        return {"first": self.first, "best": self.best, "stale": self.stale, "stopped": self.stopped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.__dict__.update(state)


@dataclasses.dataclass(frozen=True)
class Anchor:
    """What the anchor's GSIM loss needs beside the student: teacher, data and settings."""

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


def trainable(student: MAR, settings: TuneConfig, workers: Workers) -> MAR:
    """A student of which the part `settings.train` learns.

    Raises:
        ValueError: low-rank training by several processes, or a rank below 1.
    """
    student = student.eval().requires_grad_(False)
    if settings.train == "low-rank":
        if workers.count > 1:
            raise ValueError(f"low-rank training runs in one process, not in {workers.count}: --train all or head does")
        if settings.rank < 1:
            raise ValueError(f"rank {settings.rank}: expected at least 1")
        return add_low_rank(student, settings.rank, settings.seed)
    (student.head if settings.train == "head" else student).requires_grad_(True)
    return student


def first_images(
    student: MAR, config: ModelConfig, space: TokenSpace, settings: TuneConfig, device: torch.device
) -> tuple[Tensor, list[Prompt]]:
    """Images of the untouched student, four batches of all classes in turn, and their prompts."""
    labels = [i % len(config.class_names) for i in range(4 * settings.batch_size)]
    pipeline = Pipeline(copy.deepcopy(student).to(device), config, space)
    images = pipeline.sample(labels, seed=settings.seed, batch_size=settings.batch_size)
    return images.to(device), prompts_of(settings.prompt, config.class_names, labels)


@claims_folder
def tune(
    student: MAR,
    student_config: ModelConfig,
    reward: Reward,
    settings: TuneConfig,
    out: Path,
    *,
    probe: Callable[[Pipeline], dict[str, float]],
    anchor: Anchor | None = None,
    resume: bool = False,
    workers: Workers | None = None,
    quiet: bool = False,
) -> str:
    """Tune a student with `reward`, leave the best model in `out/model`, and say why tuning ended.

    Args:
        probe: held-out figures of a model on fixed seeds: some of `fd`, `diversity`, `log_probability`, `held_out`.
        anchor: the teacher and data of the anchor; needed when `settings.anchor` is not 0.
        workers: the processes that share the work; this one alone when None.

    Raises:
        ValueError: the model is a teacher, `out` holds another run, an anchor without a teacher, or a bad reward.
    """
    if not isinstance(student_config.draw, OneStep):
        raise ValueError(f"{student_config.name or 'this model'} is a teacher: distil it first (marval distill)")
    if settings.anchor and anchor is None:
        raise ValueError("the anchor needs the teacher: name it with --teacher")
    workers = workers or Workers()
    device = workers.device
    settings = settings.within(student_config.mar.num_tokens)
    Prompt.of(settings.prompt, "")
    config = dataclasses.replace(student_config, name=settings.name, iterations=settings.iterations)
    described = {
        **config.to_dict(), **dataclasses.asdict(settings), "reward": reward_identity(reward),
        "student": model_identity(student_config.name, student),
    }  # fmt: skip
    if anchor is not None and settings.anchor:
        described |= {"anchor_data": data_identity(anchor.data), "anchoring": dataclasses.asdict(anchor.settings)}
        described["teacher"] = model_identity("teacher", anchor.teacher)
    space, draw = token_space(config.space, device), draw_function(student_config)
    if settings.normalize:
        reward = standardized(reward, *first_images(student, config, space, settings, device))
    student = trainable(copy.deepcopy(student), settings, workers)
    ema = workers.place(copy.deepcopy(student).requires_grad_(False))
    student = workers.place(student)
    student.checkpoint_blocks = settings.checkpoint_blocks
    update = Updates(student, settings, (0.9, 0.999))
    networks: dict[str, nn.Module] = {"student": student, "ema": ema}
    updates = {"student": update}
    gsim = None
    if anchor is not None and settings.anchor:
        to_student = settings.anchor_to == "student"
        gsim = GSIM(anchor.teacher, config, anchor.settings, anchor.data, workers, to_student=to_student)
        networks["auxiliary"], updates["auxiliary"] = gsim.auxiliary, gsim.update
        networks |= {} if gsim.reference is None else {"reference": gsim.reference}
    parts = workers.parts(settings.batch_size, settings.accumulate)
    keeper = Keeper(settings)
    state = state_tensors(networks, updates)
    start = 0
    if resume:
        start, kept = load_state(out, described, state, workers)
        keeper.load_state_dict(kept)
    log = Log(out / LOG, start, settings.updates, settings.batch_size, quiet=quiet, workers=workers)
    if start == 0:
        keeper.see(probe(Pipeline(ema, config, space)))
        save_network(out / "model", merged(ema), config, workers)
        log(0, dict(keeper.first))
    done = start

    for step in workers.steps(start, settings.updates):
        if keeper.stopped:
            break
        rng = generator(settings.seed, "tune", step)
        labels = torch.randint(len(config.class_names), (settings.batch_size,), generator=rng)
        seeds = torch.randint(2**62, (settings.batch_size,), generator=rng).tolist()
        learnt = step - (settings.anchor_warmup if gsim is not None else 0)  # until then only phi learns
        figures: dict[str, Tensor | float] = {}
        with fast_attention(device):
            if gsim is not None:
                if learnt == 0:
                    gsim.freeze_reference()
                figures |= gsim.backward(student, step, rng, learning=learnt >= 0, weight=settings.anchor)
                figures |= gsim.update_auxiliary(rng)
            if learnt >= 0:
                figures["reward"] = torch.zeros((), device=device)
                for rows in parts:
                    tokens = sample(
                        student, draw, labels[rows].to(device), iterations=settings.iterations,
                        seeds=seeds[rows], orders=config.order, gradient_iterations=settings.gradient_iterations,
                        autocast=settings.autocast,
                    )  # fmt: skip
                    prompts = prompts_of(settings.prompt, config.class_names, labels[rows].tolist())
                    loss, rewards = workers.together(policy_loss, reward, space.decode(tokens), prompts, settings.hinge)
                    weight = workers.share(rows, settings.batch_size)
                    (loss * weight).backward()
                    figures["reward"] += rewards.detach().mean() * weight
                figures["gradient_norm"] = update(settings.learning_rate)
                update_ema(ema, student, learnt, settings.ema_decay)

        done = step + 1
        last = done == settings.updates or workers.stopping()
        saving = last or done % settings.save_every == 0
        probing = learnt >= 0 and (done % settings.probe_every == 0 or done == settings.updates)
        if saving or probing or done % settings.log_every == 0:  # figures are checked before anything is saved
            held_out = probe(Pipeline(ema, config, space)) if probing else {}
            log(done, {**figures, **held_out}, list(updates.values()))
            if probing and keeper.see(held_out):
                save_network(out / "model", merged(ema), config, workers)
        if saving:
            save_state(out, done, described, state, keeper.state_dict(), workers)
        if last:
            break
    return keeper.stopped or f"{done} of {settings.updates} updates done"
