"""MARVAL-RL: a reward's gradient through the whole K-iteration image (MARVAL, stage 2); one flat loop."""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from marval.config import ModelConfig, OneStep
from marval.losses.reward import policy_loss
from marval.model import MAR
from marval.pipeline import Pipeline
from marval.presets import TuneConfig
from marval.rewards import Reward, label_prompts, reward_identity
from marval.runtime.distributed import Workers
from marval.runtime.folder import Run, data_identity, model_identity
from marval.runtime.log import LOG, Figures, Log, add_means, due
from marval.runtime.optim import Optimizer, fast_products, update_ema
from marval.runtime.state import State, save_network
from marval.sampling import draw_function, sample
from marval.sampling.fast import compile_blocks
from marval.spaces import token_space
from marval.train.anchor import Anchor, AnchorLoss
from marval.train.distill import Probe
from marval.train.draws import tune_draws
from marval.train.keeper import Keeper
from marval.train.low_rank import add_low_rank, merged


def tuned_config(
    student: ModelConfig, settings: TuneConfig, anchor: Anchor | None
) -> tuple[ModelConfig, TuneConfig, Anchor | None]:
    """The tuned model's configuration, the settings within its number of tokens, and the anchor where it has weight."""
    if not isinstance(student.draw, OneStep):
        raise ValueError(f"{student.name or 'this model'} is a teacher: distil it first (marval distill)")
    if settings.anchor and anchor is None:
        raise ValueError("the anchor needs the teacher: name it with --teacher")
    settings = settings.within(student.mar.num_tokens)
    config = dataclasses.replace(student, name=settings.name, iterations=settings.iterations)
    return config, settings, anchor if settings.anchor else None


def described(config: ModelConfig, settings: TuneConfig, reward: Reward, anchor: Anchor | None) -> dict[str, Any]:
    """Describe what a resumed run must share, except the student itself."""
    origin = {**config.to_dict(), **dataclasses.asdict(settings), "reward": reward_identity(reward)}
    if anchor is not None:
        origin |= {"anchor_data": data_identity(anchor.data), "anchoring": dataclasses.asdict(anchor.settings)}
        origin["teacher"] = model_identity("teacher", anchor.teacher)
    return origin


def trainable(student: MAR, settings: TuneConfig, workers: Workers) -> MAR:
    """Let the part of a student learn that `settings.train` names."""
    student = student.eval().requires_grad_(False)
    if settings.train == "low-rank":
        if workers.sharded:
            raise ValueError("low-rank training does not shard: leave out --shard")
        return add_low_rank(student, settings.rank, settings.seed)
    (student.head if settings.train == "head" else student).requires_grad_(True)
    return student


def copy_networks(
    student: MAR, settings: TuneConfig, workers: Workers, anchored: AnchorLoss | None
) -> tuple[MAR, MAR, dict[str, nn.Module], dict[str, Optimizer]]:
    """Copy a student that learns and its average; all networks and optimizers that a resumed run needs, by name."""
    workers.parts(settings.batch_size, settings.accumulate)  # refuses a batch that cannot be split
    student = trainable(copy.deepcopy(student), settings, workers)
    ema = copy.deepcopy(student).requires_grad_(False)
    workers.place(ema)
    workers.place(student, settings.autocast)
    student.checkpoint_blocks = settings.checkpoint_blocks
    if settings.compile:
        compile_blocks(student)
    networks: dict[str, nn.Module] = {"student": student, "ema": ema}
    adams = {"student": Optimizer(student, workers, settings.gradient_clip, (0.9, 0.999))}
    if anchored is not None:
        networks |= anchored.networks
        adams["auxiliary"] = anchored.phi_adam
    return student, ema, networks, adams


def tune_parts(
    settings: TuneConfig, config: ModelConfig, update: int, workers: Workers
) -> Iterator[tuple[float, Tensor, dict[str, Any]]]:
    """Yield this process's parts of a batch: the weight in the batch's mean, the labels, and arguments of `sample`."""
    how = {
        "iterations": settings.iterations, "gradient_iterations": settings.gradient_iterations,
        "orders": config.order, "autocast": settings.autocast,
    }  # fmt: skip
    labels, seeds, noise, w = tune_draws(settings, config, update, workers.device)
    for rows in workers.parts(settings.batch_size, settings.accumulate):
        share = workers.share(rows, settings.batch_size)
        own = None if w is None else w[rows]
        yield share, labels[rows], {**how, "seeds": seeds[rows], "noise": noise[:, rows], "guidance": own}


def tune(
    student: MAR, student_config: ModelConfig, reward: Reward, settings: TuneConfig, run: Run, probe: Probe,
    anchor: Anchor | None = None,
) -> str:  # fmt: skip
    """Tune a student with `reward`, leave the best model in the run's `model`, and say why tuning ended.

    Args:
        probe: held-out figures of a model on fixed seeds: some of `fd`, `diversity`, `log_probability`, `held_out`.
        anchor: the teacher and data of the anchor; needed when `settings.anchor` is not 0.

    Raises:
        ValueError: the model is a teacher, the run has other settings, an anchor without a teacher, or a bad reward.
    """
    config, settings, anchor = tuned_config(student_config, settings, anchor)
    origin = {"student": model_identity(student_config.name, student), **described(config, settings, reward, anchor)}
    workers, device = run.workers, run.workers.device
    space, draw = token_space(config.space, device), draw_function(config, device)
    anchored = None if anchor is None else AnchorLoss(anchor, student_config, space, workers, settings.anchor_to)
    student, ema, networks, adams = copy_networks(student, settings, workers, anchored)
    state = State(run, origin, networks, adams)
    start, watched = state.load()
    keeper = Keeper(settings, **watched)
    log = Log(run.folder / LOG, workers, start, settings.updates, settings.batch_size, run.tensorboard)
    if start == 0:
        keeper.see(probe(Pipeline(ema, config, space)))
        save_network(run.folder / "model", merged(ema), config, workers)
        log(0, dict(keeper.first))
    done, asked = start, label_prompts(settings.prompt, config)

    for update in workers.updates(start, settings.updates):
        if keeper.stopped:
            break
        student_update = update - (settings.anchor_warmup if anchored is not None else 0)  # below 0 only phi learns
        figures = Figures()
        with fast_products(device):
            if anchored is not None:
                figures |= anchored.step(student, update, settings.anchor, student_update)
            if student_update >= 0:
                for share, labels, how in tune_parts(settings, config, update, workers):
                    tokens = sample(student, draw, student.embed(labels.to(device)), **how)
                    images = space.decode(tokens)
                    prompts = [asked[label] for label in labels.tolist()]
                    loss, rewards = workers.together(policy_loss, reward, images, prompts)
                    (loss * share).backward()
                    add_means(figures, share, reward=rewards)
                figures["gradient_norm"] = adams["student"].step(settings.learning_rate)
                update_ema(ema, student, student_update, settings.ema_decay)

        now = due(update + 1, settings, workers, settings.probe_every if student_update >= 0 else 0)
        held_out = probe(Pipeline(ema, config, space)) if now.probe else {}
        if now.log:
            log(now.update, {**figures, **held_out}, list(adams.values()))
        if now.probe and keeper.see(held_out):
            save_network(run.folder / "model", merged(ema), config, workers)
        if now.save:
            state.save(now.update, keeper.state_dict())
        done = now.update
        if now.last:
            break
    return keeper.stopped or f"{done} of {settings.updates} updates done"
