"""What a joint draw is for: tokens that are always equal, drawn in one iteration."""

import dataclasses

import pytest
import torch

from marval.config import Chain, MARConfig, ModelConfig, OneStep, PixelSpace
from marval.data import ImageData
from marval.evaluate.features import PixelFeatures
from marval.pipeline import load
from marval.presets import TrainConfig, TuneConfig
from marval.rewards import FrechetReward, WeightedReward
from marval.rewards.frechet import RealMoments
from marval.runtime.folder import open_run
from marval.runtime.rng import generator
from marval.train.teacher import train_teacher
from marval.train.tune import tune

SPACE = PixelSpace((1, 4), 3, 1, shift=0.5, scale=2.0)  # a token for each of four pixels
MAR = MARConfig(
    SPACE.token_grid, SPACE.token_dim, 1,
    encoder_dim=32, encoder_depth=1, encoder_heads=2, decoder_dim=32, decoder_depth=2, decoder_heads=2,
    head_width=32, head_depth=2, buffer_size=2, learn_variance=False,
)  # fmt: skip
CONFIG = ModelConfig(MAR, SPACE, Chain(diffusion_steps=20, clip=True), ("stripe",), 4, "stripes")
EVERY = {"batch_size": 64, "autocast": False, "ema_decay": 0.98, "save_every": 10**6}


def stripes():
    """2,048 images of four pixels of nearly one colour."""
    rng = generator("stripes")
    colours = 27 + 200 * torch.rand(2048, 3, 1, 1, generator=rng)
    images = colours + 8 * torch.randn(2048, 3, 1, 4, generator=rng)
    return ImageData(images.clamp(0, 255).to(torch.uint8), torch.zeros(2048, dtype=torch.long), ("stripe",))


def agreement(pipeline, iterations):
    """The mean correlation of the first token with the others, over the colours."""
    x = pipeline.sample_tokens([0] * 512, seeds=0, iterations=iterations)
    x = (x - x.mean(0)) / x.std(0)
    return (x[:, :1] * x[:, 1:]).mean().item()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """One that draws equal tokens in four iterations, and independent ones in one."""
    folder = tmp_path_factory.mktemp("stripes")
    with open_run(folder) as run:
        train_teacher(
            CONFIG, TrainConfig(updates=300, learning_rate=3e-3, warmup=20, decay=150, **EVERY), stripes(), run
        )
    pipeline = load(folder)
    assert agreement(pipeline, 4) > 0.8
    assert abs(agreement(pipeline, 1)) < 0.1
    return pipeline


@pytest.mark.parametrize(("joint", "updates"), [(True, 100), (False, 10)])
def test_a_joint_draw_learns_to_agree_in_one_iteration_and_other_students_cannot(joint, updates, teacher, tmp_path):
    student = dataclasses.replace(teacher.config, draw=OneStep(clip=True))
    rows = PixelFeatures()(stripes().images).double()
    reward = FrechetReward("pixels", PixelFeatures(), RealMoments.of(rows.mean(dim=0), rows.mT.cov()), 0.5)
    settings = TuneConfig(
        updates=updates, iterations=(1,), learning_rate=1e-3, joint_draw=joint, moments_warmup=2, moments_batches=0,
        probe_every=1000, **EVERY,
    )  # fmt: skip
    falling = iter((2.0, 1.0))

    def probe(pipeline):
        return {"fd": next(falling), "diversity": 1.0}

    with open_run(tmp_path) as run:
        tune(teacher.model, student, WeightedReward({"fd:pixels": (reward, 1.0)}), settings, run, probe)
    tuned = load(tmp_path)
    assert tuned.config.mar.joint_draw == joint
    assert agreement(tuned, 1) > 0.8 if joint else abs(agreement(tuned, 1)) < 0.1
