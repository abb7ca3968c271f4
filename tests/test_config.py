"""Configurations and settings check themselves where they are made; presets are sound; old checkpoints load."""

import dataclasses
import json
import math
from typing import get_args, get_origin, get_type_hints

import pytest

from marval.config import Chain, LatentSpace, MARConfig, ModelConfig, OneStep, PixelSpace
from marval.io.checkpoint import add_guidance, load_model, save_model
from marval.presets import DistillConfig, TrainConfig, TuneConfig, settings_of
from tiny import tiny_config, tiny_model

STAGES = (TrainConfig, DistillConfig, TuneConfig)
ZERO_IS_FINE = {
    "seed", "warmup", "decay", "anchor_warmup", "timestep", "guidance", "energy", "anchor", "weight_decay",
    "label_drop", "mask_ratio_min", "ema_decay", "min_diversity_ratio", "moments_warmup", "moments_decay",
    "moments_batches",
}  # fmt: skip

JOINT = dataclasses.replace(tiny_config().mar, joint_draw=True)


def numbers(stage, kind):
    """The names of a stage's settings that are numbers of this kind."""
    hints = {name: hint for name, hint in get_type_hints(stage).items() if get_origin(hint) is not tuple}
    return [name for name, hint in hints.items() if kind in (hint, *get_args(hint))]


@pytest.mark.parametrize("stage", STAGES)
def test_every_number_is_refused_out_of_its_range(stage):
    for name in [*numbers(stage, int), *numbers(stage, float)]:
        bad = [] if name in ZERO_IS_FINE else [0]
        bad += [] if name == "seed" else [-1]
        if name in numbers(stage, float):
            bad = [*map(float, bad), math.nan, *([] if name == "max_distance_ratio" else [math.inf])]
        else:
            bad += [2**63]
        for value in bad:
            with pytest.raises(ValueError, match=rf"^{name} {value!r}: expected "):
                stage(**{name: value})


@pytest.mark.parametrize("name", ["a/b", "a\\b", ".hidden", "a\nb", "x" * 101, "\ud800"])
def test_names_that_are_paths_are_refused(name):
    with pytest.raises(ValueError, match="plain name"):
        ModelConfig.from_dict({**tiny_config().to_dict(), "name": name})
    for other in ("", "tuned 2.0 (K=8)", "größer", "模型", "a:b", "x" * 100):
        assert dataclasses.replace(tiny_config(), name=other).name == other


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Chain(guidance=math.nan), "guidance nan"),
        (lambda: Chain(diffusion_steps=1), "diffusion_steps 1: expected a whole number from 2 to 1000"),
        (lambda: OneStep(timestep=999), "timestep 999.*explodes"),
        (lambda: OneStep(guidance=-1.0), "guidance -1"),
        (lambda: PixelSpace((28, 28), 1, 5, 0.3, 3.0), "28x28 pixels.*multiples of a token's 5"),
        (lambda: LatentSpace((30, 30), "kl16"), "30x30 pixels.*multiples of a token's 16"),
        (lambda: MARConfig((4, 4), 16, 3, 16, 1, 3, 16, 1, 2, 16, 1), "3 attention heads for 16 channels"),
        (lambda: MARConfig((0, 4), 16, 3, 16, 1, 2, 16, 1, 2, 16, 1), r"token_grid \(0, 4\)"),
        (lambda: dataclasses.replace(tiny_config(), class_names=("one",)), "1 class names: expected 2"),
        (lambda: DistillConfig(updates=50), "updates 50: expected more than the 100 of warmup"),
        (lambda: dataclasses.replace(tiny_config(), mar=JOINT), "joint_draw=True: .* expected a one-step student"),
        (lambda: TuneConfig(updates=100, anchor=0.5), "updates 100: expected more than the 100 of anchor_warmup"),
        (lambda: TrainConfig(updates=50, warmup=51), "warmup 51: expected at most the 50 updates"),
        (lambda: TuneConfig(gradient_iterations=9), "gradient_iterations 9: expected at most the 8"),
        (lambda: TuneConfig(iterations=()), r"iterations \(\): expected one or more whole numbers from 1"),
        (lambda: TuneConfig(joint_draw=True, train="head"), "joint_draw: .*expected anchor 0, train all"),
        (lambda: TuneConfig(prompt="{x}"), r"prompt '\{x\}': expected exactly one \{\}"),
        (lambda: settings_of(TrainConfig, "imagenet"), "preset 'imagenet': expected one of full size, imagenet256-"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_short_runs_have_a_short_warm_up_and_presets_are_sound():
    assert [TrainConfig(updates=n).warmup_updates for n in (1, 3, 800, 10_000)] == [0, 1, 400, 500]
    assert TrainConfig(updates=800, warmup=700).warmup_updates == 700
    for size in ("base", "large", "huge"):
        assert settings_of(DistillConfig, f"imagenet256-{size}").objective == "gsim"
        assert settings_of(TuneConfig, f"imagenet256-{size}").gradient_iterations == 4
    assert settings_of(DistillConfig, "fashion-mnist") == DistillConfig()
    TuneConfig(updates=50, max_distance_ratio=math.inf)  # without an anchor its warm-up is not used; never stop
    tuned = TuneConfig(iterations=(8, 2, 16), gradient_iterations=8).within(4)
    assert (tuned.iterations, tuned.gradient_iterations) == ((4, 2), 4)
    assert DistillConfig().within(49) == DistillConfig()


def test_the_full_size_teacher_has_mars_recipe():
    settings = settings_of(TrainConfig, "imagenet256-large")
    assert settings.learning_rate == 1e-4 * settings.batch_size / 256
    epoch = 1_281_167 / settings.batch_size
    assert settings.updates / epoch == pytest.approx(400, rel=1e-3)
    assert settings.warmup / epoch == pytest.approx(100, rel=1e-3)
    assert (settings.mask_ratio_min, settings.mask_ratio_std, settings.label_drop) == (0.7, 0.25, 0.1)
    assert (settings.weight_decay, settings.ema_decay, settings.gradient_clip) == (0.02, 0.9999, 3.0)
    assert settings.tokens_per_image == MARConfig.imagenet256("large").num_tokens
    assert settings.decay == 0  # a constant rate


def test_older_models_load_and_their_config_json_may_say_the_guidance(tmp_path):
    older = json.loads(json.dumps(tiny_config().to_dict()))
    older["draw"]["steps"] = older["draw"].pop("diffusion_steps")
    assert ModelConfig.from_dict(older) == tiny_config()
    config = dataclasses.replace(tiny_config(), draw=OneStep(guidance=1.2, guidance_schedule="linear"))
    older = config.to_dict()
    del older["draw"]["guidance"], older["draw"]["guidance_schedule"]
    file = tmp_path / "model.safetensors"
    assert add_guidance(older, file) == older  # nothing beside it
    save_model(tmp_path, tiny_model(), config)
    assert add_guidance(older, file)["draw"] == config.to_dict()["draw"]
    (tmp_path / "config.json").write_text('{"draw": {"guidance": 9, "guidance_schedule": "constant"}}')
    assert load_model(tmp_path)[1] == config  # weights that say it themselves are believed
    (tmp_path / "config.json").write_text("nonsense")
    assert add_guidance(older, file) == older
