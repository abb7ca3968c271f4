"""MARVAL-RL: a reward's gradient through the whole K-iteration image (MARVAL, stage 2); one flat loop."""

import copy
import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from marval.config import ModelConfig, OneStep
from marval.losses.reward import policy_loss
from marval.model import MAR
from marval.pipeline import Pipeline
from marval.presets import TuneConfig
from marval.rewards import FrechetReward, Reward, label_prompts, parts_of, reward_identity
from marval.rewards.frechet import recomputed
from marval.runtime.distributed import Workers
from marval.runtime.folder import Run, data_identity, model_identity
from marval.runtime.log import LOG, Figures, Log, add_means, due
from marval.runtime.optim import Optimizer, fast_products, update_ema
from marval.runtime.rng import generator
from marval.runtime.state import State, save_network
from marval.sampling import DrawTokens, draw_function, sample
from marval.sampling.fast import compile_blocks
from marval.spaces import TokenSpace, token_space
from marval.train.anchor import Anchor, AnchorLoss
from marval.train.distill import Probe
from marval.train.draws import tune_draws
from marval.train.keeper import Keeper
from marval.train.low_rank import add_low_rank, merged


class ImagePart(NamedTuple):
    """Some images of a batch."""

    share: float  # the weight of its mean in the batch's
    labels: list[int]
    images: Tensor


def distances_in(reward: Reward) -> tuple[dict[str, FrechetReward], bool]:
    """The Fréchet distances among a sum's rewards, by name, and whether there is nothing else in it."""
    parts = parts_of(reward)
    distances = {name: part for name, (part, _) in parts.items() if isinstance(part, FrechetReward)}
    return distances, len(distances) == len(parts)


def tuned_settings(student: ModelConfig, settings: TuneConfig, distances: bool) -> tuple[TuneConfig, int]:
    """Check what is asked for; the settings for this student, and the number of updates before its first.

    Only phi learns in these, and moments are gathered.

    Args:
        distances: whether there are Fréchet distances among the rewards.
    """
    if not isinstance(student.draw, OneStep):
        raise ValueError(f"{student.name or 'this model'} is a teacher: distil it first (marval distill)")
    waits = settings.anchor_warmup if settings.anchor else 0, settings.moments_warmup if distances else 0
    if (warmup := max(waits)) >= settings.updates:  # the settings themselves compare with the anchor's
        raise ValueError(f"--updates {settings.updates}: expected more than the {warmup} of --moments-warmup")
    return settings.within(student.mar.num_tokens), warmup


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
    student: MAR, settings: TuneConfig, workers: Workers, anchored: AnchorLoss | None,
    distances: Mapping[str, FrechetReward],
) -> tuple[MAR, MAR, dict[str, nn.Module], dict[str, Optimizer]]:  # fmt: skip
    """Copy a student that learns and its average; all networks and optimizers that a resumed run needs, by name."""
    workers.parts(settings.batch_size, settings.accumulate)  # refuses a batch that cannot be split
    student = copy.deepcopy(student)
    if settings.joint_draw and not student.config.joint_draw:
        student.draw_jointly(generator(settings.seed, "noise in mask tokens"))
    student = trainable(student, settings, workers)
    ema = copy.deepcopy(student).requires_grad_(False)
    workers.place(ema)
    workers.place(student, settings.autocast)
    student.checkpoint_blocks = settings.checkpoint_blocks
    if settings.compile:
        compile_blocks(student)
    networks: dict[str, nn.Module] = {"student": student, "ema": ema}
    networks |= {f"moments.{name}": distance.moments for name, distance in distances.items()}
    adams = {"student": Optimizer(student, workers, settings.gradient_clip, (0.9, 0.999))}
    if anchored is not None:
        networks |= anchored.networks
        adams["auxiliary"] = anchored.phi_adam
    return student, ema, networks, adams


def drawn_parts(
    student: MAR, draw: DrawTokens, space: TokenSpace, settings: TuneConfig, config: ModelConfig, update: int,
    iterations: int, workers: Workers, distances: bool, batch: int = 0,
) -> Iterable[ImagePart]:  # fmt: skip
    """Draw this process's parts of a batch, one by one.

    Args:
        batch: counts the batches of an update.
        distances: whether all parts are held, for Fréchet distances: then several are without the decoder's
            activations, and all classes have the same share.
    """
    labels, seeds, noise, w = tune_draws(settings, config, update, workers.device, distances, batch)
    decode = recomputed(space.decode) if distances and settings.accumulate > 1 else space.decode
    for rows in workers.parts(settings.batch_size, settings.accumulate):
        tokens = sample(
            student, draw, student.embed(labels[rows].to(workers.device)),
            iterations=iterations, gradient_iterations=settings.gradient_iterations, orders=config.order,
            seeds=seeds[rows], noise=noise[:, rows], guidance=None if w is None else w[rows],
            autocast=settings.autocast,
        )  # fmt: skip
        yield ImagePart(workers.share(rows, settings.batch_size), labels[rows].tolist(), decode(tokens))


def observed(
    parts: Iterable[ImagePart], others: Iterable[ImagePart], distances: Mapping[str, FrechetReward], workers: Workers,
    turn: int, student_update: int, figures: Figures,
) -> list[ImagePart]:  # fmt: skip
    """Draw all parts and show them to the distances, before any gradient; add these to `figures`, return the parts.

    Args:
        others: images that count in the moments, without a gradient.
    """
    with torch.no_grad():
        more = [part.images for part in others]
    with torch.set_grad_enabled(student_update >= 0):
        whole = list(parts)
        for name, distance in distances.items():
            figures[name] = distance.observe([part.images for part in whole], workers, student_update <= 0, more, turn)
    return whole


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
    distances, alone = distances_in(reward)
    settings, warmup = tuned_settings(student_config, settings, bool(distances))
    if (anchor is None) != (settings.anchor == 0):
        raise ValueError(f"anchor {settings.anchor:g}: expected a weight above 0 with the teacher, 0 without")
    mar = dataclasses.replace(student_config.mar, joint_draw=student_config.mar.joint_draw or settings.joint_draw)
    config = dataclasses.replace(student_config, mar=mar, name=settings.name, iterations=settings.default_iterations)
    origin = {"student": model_identity(student_config.name, student), **described(config, settings, reward, anchor)}
    workers, device = run.workers, run.workers.device
    space, draw = token_space(config.space, device), draw_function(config, device)
    anchored = None if anchor is None else AnchorLoss(anchor, student_config, space, workers, settings.anchor_to)
    student, ema, networks, adams = copy_networks(student, settings, workers, anchored, distances)
    state = State(run, origin, networks, adams)
    start, watched = state.load()
    keeper = Keeper(settings, by_distance=alone, **watched)
    log = Log(run.folder / LOG, workers, start, settings.updates, settings.batch_size, run.tensorboard)
    if start == 0:
        keeper.see(probe(Pipeline(ema, config, space)))
        save_network(run.folder / "model", merged(ema), config, workers)
        log(0, dict(keeper.first))
    done, asked = start, label_prompts(settings.prompt, config)

    for update in workers.updates(start, settings.updates):
        if keeper.stopped:
            break
        student_update = update - warmup  # below 0 only phi learns, and moments are gathered
        with fast_products(device):
            figures = Figures() if anchored is None else anchored.step(student, update, settings.anchor, student_update)
            turn = settings.turn(update)
            iterations = settings.iterations[turn]
            if len(settings.iterations) > 1:
                figures["iterations"] = float(iterations)
            how = (student, draw, space, settings, config, update, iterations, workers, bool(distances))
            parts: Iterable[ImagePart] = drawn_parts(*how)
            if distances:
                others = itertools.chain.from_iterable(
                    drawn_parts(*how, i + 1) for i in range(settings.moments_batches)
                )
                parts = observed(parts, others, distances, workers, turn, student_update, figures)
            if student_update >= 0:
                for share, labels, images in parts:
                    loss, rewards = workers.together(policy_loss, reward, images, [asked[label] for label in labels])
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
    state.wait()
    return keeper.stopped or f"{done} of {settings.updates} updates done"
