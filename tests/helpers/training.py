"""Tiny runs of every stage, and what they leave in their folder."""

import dataclasses
import json

from safetensors.torch import load_file

from marval.config import OneStep
from marval.evaluate.features import PixelFeatures
from marval.presets import DistillConfig, TrainConfig, TuneConfig
from marval.rewards import FrechetReward, WeightedReward
from marval.rewards.frechet import RealMoments
from marval.runtime.folder import open_run
from marval.train.anchor import Anchor
from marval.train.distill import distill
from marval.train.teacher import train_teacher
from marval.train.tune import tune
from tiny import tiny_config, tiny_data, tiny_model

EVERY = {"updates": 6, "save_every": 2, "log_every": 1, "autocast": False}
TRAIN = TrainConfig(batch_size=8, tokens_per_image=6, warmup=2, decay=2, **EVERY)
DISTILL = DistillConfig(
    batch_size=8, tokens_per_image=6, warmup=1, decay=2, guidance=1.5, guidance_schedule="linear", **EVERY
)
TUNE = TuneConfig(batch_size=4, iterations=(4,), gradient_iterations=4, learning_rate=1e-3, probe_every=50, **EVERY)
STUDENT = dataclasses.replace(tiny_config(), draw=OneStep(guidance=1.5, guidance_schedule="linear"))


def brightness(images, prompts):
    """A reward."""
    return images.mean(dim=(1, 2, 3))


def distance_reward(decay=0.9, turns=1):
    """The Fréchet distance to the tiny data, in pixels."""
    rows = PixelFeatures()(tiny_data().images).double()
    real = RealMoments.of(rows.mean(dim=0), rows.mT.cov())
    return FrechetReward("pixels", PixelFeatures(), real, decay, "tiny data", turns=turns)


def steady_probe(pipeline):
    """Held-out figures that never change."""
    return {"fd": 1.0, "diversity": 1.0, "log_probability": -1.0}


def rising_probe():
    """Held-out figures that never stop a run."""
    numbers = iter(range(1000))
    return lambda pipeline: {"fd": 1.0, "diversity": 1.0, "log_probability": float(next(numbers))}


def anchor_of(seed=1, data=None, **changes):
    """A teacher, data and settings for the anchor."""
    return Anchor(tiny_model(seed), tiny_data() if data is None else data, dataclasses.replace(DISTILL, **changes))


def run_train(out, *, resume=False, data=None, init=None, **changes):
    """Train a teacher."""
    data, settings = tiny_data() if data is None else data, dataclasses.replace(TRAIN, **changes)
    with open_run(out, resume=resume) as run:
        return train_teacher(tiny_config(), settings, data, run, init=init)


def run_distill(out, *, resume=False, data=None, teacher=0, **changes):
    """Distil a teacher."""
    data, settings = tiny_data() if data is None else data, dataclasses.replace(DISTILL, **changes)
    with open_run(out, resume=resume) as run:
        return distill(tiny_model(teacher), tiny_config(), settings, data, run)


def run_tune(out, *, resume=False, reward=brightness, student=None, anchored=None, probe=steady_probe, **changes):
    """Tune a student."""
    settings, student = dataclasses.replace(TUNE, **changes), student or tiny_model()
    config = dataclasses.replace(STUDENT, mar=student.config)
    with open_run(out, resume=resume) as run:
        return tune(student, config, reward, settings, run, probe=probe, anchor=anchored)


def run_anchored(out, *, resume=False, **changes):
    """Tune a student with an anchor."""
    return run_tune(out, resume=resume, **{"anchored": anchor_of(), "anchor": 0.5, "anchor_warmup": 1, **changes})


def run_distance(out, *, resume=False, **changes):
    """Tune a student with a Fréchet distance, and a little of another reward."""
    distance = distance_reward(turns=len(changes.get("iterations", TUNE.iterations)))
    reward = WeightedReward({"fd:pixels": (distance, 1.0), "brightness": (brightness, 0.01)})
    return run_tune(out, resume=resume, **{"reward": reward, "moments_warmup": 1, **changes})


def log_of(out):
    """The lines of a run's log, without how fast it was."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert all(line.pop("images_per_second", 1) > 0 for line in lines)
    return lines


def state_of(out, update):
    """The tensors of the only saved state of a run, which is of this update."""
    (state,) = out.glob("state-*")
    assert json.loads((state / "run.json").read_text())["update"] == update
    return {key: value for file in state.glob("*.safetensors") for key, value in load_file(file).items()}


def weights_of(out):
    """The tensors of the model that a run left."""
    return load_file(out / "model/model.safetensors")
