"""The training loops: resumed runs equal uninterrupted ones to the bit, frozen networks stay frozen, errors help."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from marval.config import OneStep
from marval.data import batch_indices
from marval.pipeline import Pipeline, load
from marval.presets import DistillConfig, TrainConfig, TuneConfig
from marval.runtime import state as state_module
from marval.runtime.folder import open_run
from marval.runtime.optim import learning_rate_factor
from marval.runtime.state import shard_files
from marval.train import distill as distill_module
from marval.train import teacher as teacher_module
from marval.train import tune as tuning
from tiny import tiny_config, tiny_data, tiny_model


@pytest.fixture
def config():
    return CONFIG


@pytest.fixture(scope="module")
def data():
    return tiny_data()


CONFIG = tiny_config()
TRAIN = TrainConfig(
    updates=12, batch_size=8, tokens_per_image=6, warmup=3, decay=4, save_every=5, log_every=1, autocast=False
)
DISTILL = DistillConfig(
    updates=12,
    batch_size=8,
    tokens_per_image=6,
    warmup=2,
    save_every=5,
    log_every=1,
    autocast=False,
    guidance=1.5,
    guidance_schedule="linear",
)
FINETUNE = TuneConfig(
    updates=12, iterations=4, gradient_iterations=4, batch_size=4, learning_rate=1e-3, save_every=5,
    log_every=1, probe_every=50,
)  # fmt: skip


def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))


def steady_probe(pipeline):
    return {"fd": 1.0, "diversity": 1.0, "log_probability": -1.0}


def rising_probe():
    """Held-out figures that never stop a run."""
    numbers = iter(range(1000))
    return lambda pipeline: {"fd": 1.0, "diversity": 1.0, "log_probability": float(next(numbers))}


def run_train(config, data, out, resume=False, settings=TRAIN):
    with open_run(out, resume=resume) as run:
        teacher_module.train_teacher(config, settings, data, run)


def run_distill(config, data, out, resume=False, settings=DISTILL):
    with open_run(out, resume=resume) as run:
        distill_module.distill(tiny_model(), config, settings, data, run)


def run_tune(config, data, out, resume=False, settings=FINETUNE, reward=brightness, probe=steady_probe):
    student = dataclasses.replace(config, draw=OneStep())
    with open_run(out, resume=resume) as run:
        return tuning.tune(tiny_model(), student, reward, settings, run, probe=probe)


def run_low_rank(config, data, out, resume=False):
    run_tune(config, data, out, resume, dataclasses.replace(FINETUNE, train="low-rank", rank=2, normalize=True))


def run_held_to_itself(config, data, out, resume=False):
    run_anchored(config, data, out, resume, anchor_to="student")


def run_anchored(config, data, out, resume=False, **changes):
    student = dataclasses.replace(config, draw=OneStep())
    settings = dataclasses.replace(FINETUNE, anchor=0.5, anchor_warmup=2, **changes)
    anchor = tuning.Anchor(tiny_model(1), data, DISTILL)
    with open_run(out, resume=resume) as run:
        tuning.tune(tiny_model(), student, brightness, settings, run, probe=steady_probe, anchor=anchor)


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def state_of(out, step):
    """The tensors of the only saved state of a run, which is of this step."""
    (state,) = out.glob("state-*")
    assert json.loads((state / "run.json").read_text())["update"] == step
    return {key: value for file in state.glob("*.safetensors") for key, value in load_file(file).items()}


class KilledError(Exception):
    pass


@pytest.mark.parametrize(
    ("run", "module", "inner"),
    [
        (run_train, teacher_module, "teacher_loss"),
        (run_distill, distill_module, "theta_loss"),
        (run_tune, tuning, "policy_loss"),
        (run_anchored, tuning, "policy_loss"),
        (run_held_to_itself, tuning, "policy_loss"),
        (run_low_rank, tuning, "policy_loss"),
    ],
)
def test_resumed_run_equals_uninterrupted_to_the_bit(run, module, inner, data, config, tmp_path, monkeypatch):
    run(config, data, tmp_path / "whole")
    calls, original = [], getattr(module, inner)

    def dies_in_the_eighth_step(*arguments):
        calls.append(1)
        if len(calls) == 8:
            raise KilledError
        return original(*arguments)

    monkeypatch.setattr(module, inner, dies_in_the_eighth_step)
    with pytest.raises(KilledError):
        run(config, data, tmp_path / "parts")
    monkeypatch.setattr(module, inner, original)
    run(config, data, tmp_path / "parts", resume=True)

    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")
    whole, parts = state_of(tmp_path / "whole", 12), state_of(tmp_path / "parts", 12)
    assert whole.keys() == parts.keys()
    assert any("exp_avg_sq" in key for key in whole)
    for key, value in whole.items():
        assert torch.equal(value, parts[key]), key
    first, second = (load_file(tmp_path / side / "model/model.safetensors") for side in ("whole", "parts"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_distillation_moves_the_student_and_not_the_teacher(data, config, tmp_path):
    teacher = tiny_model()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    with open_run(tmp_path / "run") as run:
        distill_module.distill(teacher, config, DISTILL, data, run)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    student = load(tmp_path / "run")
    assert student.config.draw == OneStep(755, config.draw.clip, DISTILL.guidance, DISTILL.guidance_schedule)
    assert config.draw.clip
    assert any(not torch.equal(value, before[key]) for key, value in student.model.state_dict().items())


def test_teacher_learns(data, config, tmp_path):
    settings = dataclasses.replace(TRAIN, updates=150, learning_rate=3e-3, decay=50, save_every=150)
    run_train(config, data, tmp_path / "run", settings=settings)
    losses = [line["loss"] for line in log_of(tmp_path / "run")]
    assert sum(losses[-20:]) < 0.75 * sum(losses[:20])


def test_tuning_raises_the_reward_and_trains_the_named_part_only(data, config, tmp_path):
    settings = dataclasses.replace(FINETUNE, updates=25, train="head", learning_rate=3e-3, patience=99)
    run_tune(config, data, tmp_path / "run", settings=settings)
    rewards = [line["reward"] for line in log_of(tmp_path / "run") if "reward" in line]
    assert sum(rewards[-5:]) > sum(rewards[:5])
    state = state_of(tmp_path / "run", 25)
    for key, value in tiny_model().state_dict().items():
        assert torch.equal(value, state[f"student.{key}"]) != key.startswith("diffloss") or "in_ln" in key, key


def test_low_rank_tuning_learns_factors_and_leaves_a_plain_model(data, config, tmp_path):
    settings = dataclasses.replace(FINETUNE, updates=25, train="low-rank", rank=2, learning_rate=1e-2)
    ended = run_tune(config, data, tmp_path / "run", settings=settings, probe=rising_probe())
    assert ended == "25 of 25 updates done"
    rewards = [line["reward"] for line in log_of(tmp_path / "run") if "reward" in line]
    assert sum(rewards[-5:]) > sum(rewards[:5])
    state, before = state_of(tmp_path / "run", 25), tiny_model().state_dict()
    learnt = {key for key in state if key.startswith("optimizer.student.") and key.endswith("exp_avg")}
    assert learnt
    assert all(key.endswith((".a.exp_avg", ".b.exp_avg")) for key in learnt)
    for key, value in before.items():
        kept = state.get(f"student.{key}", state.get(f"student.{key[:-6]}parametrizations.weight.original"))
        assert torch.equal(value, kept), key
    tuned = load(tmp_path / "run")  # strict: official names only
    for key, value in tuned.model.state_dict().items():
        difference = value - before[key]
        if key.endswith("qkv.weight"):
            assert torch.linalg.matrix_rank(difference, rtol=1e-3) == 2, key
        elif value.ndim < 2:
            assert not difference.any(), key


def test_low_rank_factors_reach_every_use_of_a_weight_and_merge(config):
    """Also where a block multiplies by slices of its weight."""
    from marval.sampling import draw_function, sample
    from marval.train.low_rank import add_low_rank, merged

    plain, network = tiny_model(), add_low_rank(tiny_model(), 2, seed=0)
    draw = draw_function(dataclasses.replace(config, draw=OneStep()))
    how = {"iterations": 3, "seeds": [1, 2]}
    expected = sample(plain, draw, torch.tensor([0, 1]), **how)
    assert torch.equal(sample(network, draw, torch.tensor([0, 1]), **how), expected)
    factors = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert all(name.endswith((".a", ".b")) for name in factors)
    sample(network, draw, torch.tensor([0, 1]), **how, gradient_iterations=3).square().sum().backward()
    reached = {name for name, p in factors.items() if name.endswith(".b") and "res_blocks" not in name}
    assert any("decoder_blocks.1.attn.qkv" in name for name in reached)
    assert all(factors[name].grad.any() for name in reached)  # the gates of the head's blocks are closed at first
    for parameter in factors.values():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    changed = sample(network, draw, torch.tensor([0, 1]), **how)
    assert (changed - expected).abs().max() > 1e-3
    torch.testing.assert_close(sample(merged(network), draw, torch.tensor([0, 1]), **how), changed)
    assert merged(network).state_dict().keys() == plain.state_dict().keys()


def test_an_anchor_to_the_student_begins_at_no_gap_and_holds_it(data, config, tmp_path):
    drift = {}
    for weight in (1e-9, 30.0):
        out = tmp_path / str(weight)
        student = dataclasses.replace(config, draw=OneStep())
        settings = dataclasses.replace(
            FINETUNE, updates=25, anchor=weight, anchor_to="student", anchor_warmup=4, learning_rate=3e-3
        )
        anchor = tuning.Anchor(tiny_model(1), data, DISTILL)
        with open_run(out) as run:
            tuning.tune(tiny_model(), student, brightness, settings, run, probe=rising_probe(), anchor=anchor)
        log = [line for line in log_of(out) if "l2" in line]
        assert log[0]["update"] == 5
        assert log[0]["l1"] == log[0]["l2"] == 0  # phi and its frozen copy are one
        assert max(line["l2"] for line in log) > 0
        drift[weight] = log_of(out)[-1]["reward"] - log[0]["reward"]
        state = state_of(out, 25)
        moved = [
            not torch.equal(state[key], state[key.replace("reference", "auxiliary")])
            for key in state
            if "reference." in key
        ]
        assert any(moved)
    assert drift[30.0] < 0.7 * drift[1e-9]


def test_a_hinge_stops_good_images_from_pushing():
    from marval.losses.reward import policy_loss

    images = torch.tensor([0.2, 0.5, 0.9]).view(3, 1, 1, 1).requires_grad_(True)
    loss, rewards = policy_loss(lambda x, prompts: x.sum(dim=(1, 2, 3)), images, ["a"] * 3, hinge=0.6)
    loss.backward()
    assert loss.item() == pytest.approx(-(0.2 + 0.5 + 0.6) / 3)
    torch.testing.assert_close(rewards, torch.tensor([0.2, 0.5, 0.9]))
    torch.testing.assert_close(images.grad.flatten(), torch.tensor([-1 / 3, -1 / 3, 0.0]))


def test_normalized_rewards_have_mean_0_and_deviation_1_part_by_part():
    from marval.rewards import WeightedReward, standardized
    from marval.runtime.rng import generator

    images = torch.rand(50, 1, 4, 4, generator=generator("images"))
    both = WeightedReward({"mean": (brightness, 1.0), "big": (lambda x, prompts: 1000 * x[:, 0, 0, 0], 0.5)})
    normalized = standardized(both, images, ["a"] * 50)
    for part, _ in normalized.rewards.values():
        values = part(images, ["a"] * 50)
        assert values.mean().item() == pytest.approx(0, abs=1e-5)
        assert values.std().item() == pytest.approx(1, rel=1e-5)
    assert [weight for _, weight in normalized.rewards.values()] == [1.0, 0.5]
    with pytest.raises(ValueError, match=r"reward same: it is 3 for all of 50 images"):
        standardized(WeightedReward({"same": (lambda x, p: 0 * x.sum((1, 2, 3)) + 3, 1.0)}), images, ["a"] * 50)


def test_low_rank_asks_for_one_process_and_a_rank():
    from marval.runtime.distributed import Workers

    with pytest.raises(ValueError, match="rank 0"):
        dataclasses.replace(FINETUNE, train="low-rank", rank=0)
    settings = dataclasses.replace(FINETUNE, train="low-rank")
    with pytest.raises(ValueError, match="one process, not in 2"):
        tuning.trainable(tiny_model(), settings, Workers(count=2))


def test_a_reward_that_becomes_nan_names_the_prompt_and_keeps_state_and_model(data, config, tmp_path):
    from marval.rewards import WeightedReward

    calls = []

    def breaks(images, prompts):
        calls.append(1)
        value = images.mean(dim=(1, 2, 3))
        broken = torch.tensor(["square" in prompt for prompt in prompts])
        return torch.where(broken, torch.nan, value) if len(calls) > 7 else value

    with pytest.raises(ValueError, match=r"reward mine: not finite for the prompt 'a high-quality .* square'"):
        run_tune(config, data, tmp_path / "run", reward=WeightedReward({"mine": (breaks, 1.0)}))
    assert len(calls) >= 8
    assert all(value.isfinite().all() for value in state_of(tmp_path / "run", 5).values())
    assert load(tmp_path / "run").sample([0]).isfinite().all()


@pytest.mark.parametrize(
    ("name", "values", "reason", "last_step"),
    [
        ("fd", [1.0, 1.05, 1.2, 1.0], "Fréchet", 4),
        ("diversity", [1.0, 0.97, 0.9, 1.0], "diversity", 4),
        ("log_probability", [-1.0, -0.5, -0.6, -0.7, -0.8], "held-out", 8),
    ],
)
def test_tuning_stops_when_held_out_figures_turn_and_keeps_the_best(
    name, values, reason, last_step, data, config, tmp_path
):
    seen = iter(values)
    rising = iter(range(100))

    def probe(pipeline):
        figures = {"fd": 1.0, "diversity": 1.0, "log_probability": -1.0 + 0.01 * next(rising)}
        return figures | {name: next(seen)}

    out = tmp_path / "run"
    settings = dataclasses.replace(FINETUNE, updates=100, probe_every=2, patience=3)
    ended = run_tune(config, data, out, settings=settings, probe=probe)
    assert reason in ended
    assert log_of(out)[-1]["update"] == last_step
    best_step = 2  # in all three cases the first probe after the start is the last good one
    other = tmp_path / "until-best"
    run_tune(config, data, other, settings=dataclasses.replace(settings, updates=best_step, probe_every=50))
    expected = state_of(other, best_step)
    found = load_file(out / "model/model.safetensors")
    assert all(torch.equal(found[key], expected[f"ema.{key}"]) for key in found)


def test_a_student_is_refused_as_teacher_and_a_teacher_as_student(data, config, tmp_path):
    with pytest.raises(ValueError, match="one-step student already"):
        run_distill(dataclasses.replace(config, draw=OneStep()), data, tmp_path)
    with pytest.raises(ValueError, match="distil it first"), open_run(tmp_path / "run") as run:
        tuning.tune(tiny_model(), config, brightness, FINETUNE, run, probe=steady_probe)


def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(data, config, tmp_path):
    run_train(config, data, tmp_path / "run")
    with pytest.raises(ValueError, match="--resume"):
        run_train(config, data, tmp_path / "run")
    with pytest.raises(ValueError, match="batch_size was 8, now 4"):
        run_train(config, data, tmp_path / "run", resume=True, settings=dataclasses.replace(TRAIN, batch_size=4))
    with pytest.raises(ValueError, match="nothing to resume"):
        run_train(config, data, tmp_path / "other", resume=True)


def test_a_damaged_state_is_one_clear_error(data, config, tmp_path):
    run_train(config, data, tmp_path / "run")
    (state,) = (tmp_path / "run").glob("state-*")
    (shard,) = state.glob("*.safetensors")
    content = shard.read_bytes()
    for damaged in (content[:1000], b"", content[:-5]):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            run_train(config, data, tmp_path / "run", resume=True)
    shard.write_bytes(content)
    (state / "run.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        run_train(config, data, tmp_path / "run", resume=True)


def test_a_large_state_is_written_in_files_of_bounded_size(data, config, tmp_path, monkeypatch):
    monkeypatch.setattr(state_module, "FILE_BYTES", 20_000)
    tensors = {"a": torch.zeros(5000), "b": torch.zeros(50_000), "c": torch.zeros(1), "d": torch.zeros(4000)}
    assert shard_files(tensors) == {"a": 1, "b": 2, "c": 3, "d": 3}
    run_train(config, data, tmp_path / "run")
    (state,) = (tmp_path / "run").glob("state-*")
    files = sorted(state.glob("*.safetensors"))
    largest = max(tensor.nbytes for file in files for tensor in load_file(file).values())
    assert len(files) > 3
    assert all(file.stat().st_size < 20_000 + largest + 20_000 for file in files)


def break_losses(monkeypatch, steps):
    """Losses of these teacher's steps (from 1) are not finite."""
    original, calls = teacher_module.teacher_loss, []

    def broken(*arguments):
        calls.append(1)
        return original(*arguments) * (float("nan") if len(calls) in steps else 1.0)

    monkeypatch.setattr(teacher_module, "teacher_loss", broken)


def test_a_step_that_is_not_finite_is_skipped_and_counted(data, config, tmp_path, monkeypatch):
    break_losses(monkeypatch, {4, 8})
    run_train(config, data, tmp_path / "run")
    log = log_of(tmp_path / "run")
    assert [line["skipped"] for line in log] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2]
    assert [line["loss"] is None for line in log] == [step in (4, 8) for step in range(1, 13)]
    state = state_of(tmp_path / "run", 12)
    assert all(value.isfinite().all() for value in state.values())
    assert state["optimizer.model.z_proj.weight.step"].item() == 10


def test_a_skipped_step_changes_no_weight(data, config, tmp_path, monkeypatch):
    run_train(config, data, tmp_path / "three", settings=dataclasses.replace(TRAIN, updates=3, decay=1))
    break_losses(monkeypatch, {4})
    run_train(config, data, tmp_path / "four", settings=dataclasses.replace(TRAIN, updates=4, decay=1))
    before, after = state_of(tmp_path / "three", 3), state_of(tmp_path / "four", 4)
    for key in before:
        if key.startswith("model."):
            assert torch.equal(before[key], after[key]), key


def test_too_many_steps_that_are_not_finite_stop_the_run_and_keep_the_last_state(data, config, tmp_path, monkeypatch):
    monkeypatch.setattr("marval.runtime.log.MOST_SKIPPED", 3)
    break_losses(monkeypatch, set(range(8, 99)))
    settings = dataclasses.replace(TRAIN, updates=99)
    with pytest.raises(ValueError, match=r"3 updates in a row .* up to update 10.*learning_rate 0.001"):
        run_train(config, data, tmp_path / "run", settings=settings)
    state = state_of(tmp_path / "run", 5)
    assert all(value.isfinite().all() for value in state.values())
    assert load(tmp_path / "run").sample([0]).isfinite().all()


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda images, prompts: images.mean(), "expected one number per image"),
        (lambda images, prompts: images.detach().mean(dim=(1, 2, 3)), "no gradient"),
        (lambda images, prompts: images.mean(dim=(1, 2, 3)) * float("nan"), "not finite for the prompt"),
    ],
)
def test_a_bad_reward_is_named(reward, message, data, config, tmp_path):
    from marval.rewards import WeightedReward

    with pytest.raises(ValueError, match=message):
        run_tune(config, data, tmp_path / "run", reward=WeightedReward({"mine": (reward, 1.0)}))
    assert isinstance(load(tmp_path / "run"), Pipeline)  # the student that it started from


def test_batches_cover_every_image_once_per_epoch():
    drawn = torch.cat([batch_indices(10, 4, step, seed=0) for step in range(5)])
    assert drawn[:10].sort().values.tolist() == drawn[10:].sort().values.tolist() == list(range(10))
    assert drawn[:10].tolist() != drawn[10:].tolist()


def test_learning_rate_rises_stays_and_falls():
    factors = [learning_rate_factor(step, 4, 5, 20) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(factors[4:16]) == {1.0}
    assert factors[15:] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert [learning_rate_factor(step, 1, 2000, 4) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]  # a short run
    assert learning_rate_factor(0, 1, 2000, -50) == 0.0  # never a step up the loss


def test_a_finished_run_survives_a_move(data, config, tmp_path):
    run_train(config, data, tmp_path / "run")
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    assert load(tmp_path / "elsewhere/model").sample(["cross"], seed=3).shape == (1, 1, 8, 8)
