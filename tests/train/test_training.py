"""Every stage learns what it should, and a resumed run equals an uninterrupted one to the bit."""

import pytest
import torch

from marval.data import batch_indices
from marval.pipeline import load
from marval.runtime.optim import decayed, learning_rate_factor
from marval.train import distill as distill_module
from marval.train import teacher as teacher_module
from marval.train import tune as tune_module
from tiny import tiny_model
from training import (
    log_of,
    rising_probe,
    run_anchored,
    run_distance,
    run_distill,
    run_train,
    run_tune,
    state_of,
    weights_of,
)


@pytest.mark.parametrize(
    ("run", "changes", "module", "loss"),
    [
        (run_train, {}, teacher_module, "denoising_loss"),
        (run_distill, {}, distill_module, "theta_loss"),
        (run_tune, {}, tune_module, "policy_loss"),
        (run_tune, {"train": "low-rank", "rank": 2}, tune_module, "policy_loss"),
        (run_tune, {"joint_draw": True}, tune_module, "policy_loss"),
        (run_anchored, {}, tune_module, "policy_loss"),
        (run_distance, {}, tune_module, "policy_loss"),
        (run_anchored, {"anchor_to": "student"}, tune_module, "policy_loss"),
        (run_anchored, {"student": tiny_model(joint_draw=True, cached=True)}, tune_module, "policy_loss"),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(run, changes, module, loss, tmp_path, monkeypatch):
    run(tmp_path / "whole", **changes)
    calls, original = [], getattr(module, loss)

    def dies_at_the_fourth(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise InterruptedError
        return original(*arguments)

    with monkeypatch.context() as killed:
        killed.setattr(module, loss, dies_at_the_fourth)
        with pytest.raises(InterruptedError):
            run(tmp_path / "parts", **changes)
    run(tmp_path / "parts", resume=True, **changes)

    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")
    whole, parts = state_of(tmp_path / "whole", 6), state_of(tmp_path / "parts", 6)
    assert whole.keys() == parts.keys()
    assert any("exp_avg_sq" in key for key in whole)
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())
    first, second = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_teacher_learns(tmp_path):
    run_train(tmp_path, updates=150, learning_rate=3e-3, decay=50, save_every=150)
    losses = [line["loss"] for line in log_of(tmp_path)]
    assert sum(losses[-20:]) < 0.75 * sum(losses[:20])


def rises(run):
    """Whether the reward rose in a run."""
    rewards = [line["reward"] for line in log_of(run) if "reward" in line]
    return sum(rewards[-5:]) > sum(rewards[:5])


def test_tuning_raises_the_reward_and_trains_the_named_part_only(tmp_path):
    run_tune(tmp_path, updates=25, train="head", learning_rate=3e-3, patience=99)
    assert rises(tmp_path)
    state = state_of(tmp_path, 25)
    for key, value in tiny_model().state_dict().items():
        assert torch.equal(value, state[f"student.{key}"]) != key.startswith("diffloss") or "in_ln" in key, key


def test_low_rank_tuning_learns_factors_and_leaves_a_plain_model(tmp_path):
    ended = run_tune(tmp_path, updates=25, train="low-rank", rank=2, learning_rate=1e-2, probe=rising_probe())
    assert ended == "25 of 25 updates done"
    assert rises(tmp_path)
    state, before = state_of(tmp_path, 25), tiny_model().state_dict()
    learnt = {key for key in state if key.startswith("optimizer.student.") and key.endswith("exp_avg")}
    assert learnt
    assert all(key.endswith((".a.exp_avg", ".b.exp_avg")) for key in learnt)
    tuned = load(tmp_path)  # strict: official names only
    for key, value in tuned.model.state_dict().items():
        original = state.get(f"student.{key}", state.get(f"student.{key[:-6]}parametrizations.weight.original"))
        assert torch.equal(before[key], original), key
        difference = value - before[key]
        if key.endswith("qkv.weight"):
            assert torch.linalg.matrix_rank(difference, rtol=1e-3) == 2, key
        elif value.ndim < 2:
            assert not difference.any(), key


def test_an_anchor_to_the_student_begins_at_no_gap_and_holds_it(tmp_path):
    drift = {}
    for weight in (1e-9, 30.0):
        out, how = tmp_path / str(weight), {"anchor_to": "student", "anchor_warmup": 4, "learning_rate": 3e-3}
        run_anchored(out, updates=25, anchor=weight, probe=rising_probe(), **how)
        log = [line for line in log_of(out) if "l2" in line]
        assert log[0]["update"] == 5
        assert log[0]["l1"] == log[0]["l2"] == 0  # phi and its frozen copy are one
        assert max(line["l2"] for line in log) > 0
        drift[weight] = log_of(out)[-1]["reward"] - log[0]["reward"]
        state = state_of(out, 25)
        references = [key for key in state if key.startswith("reference.")]
        assert any(not torch.equal(state[key], state[key.replace("reference", "auxiliary")]) for key in references)
    assert drift[30.0] < 0.7 * drift[1e-9]


def test_tuning_stops_when_held_out_figures_turn_and_keeps_the_best(tmp_path):
    figures, rising = iter([-1.0, -0.5, -0.6, -0.7, -0.8]), rising_probe()

    def probe(pipeline):
        return rising(pipeline) | {"log_probability": next(figures)}

    assert "held-out" in run_tune(tmp_path / "run", updates=100, probe_every=2, patience=3, probe=probe)
    assert log_of(tmp_path / "run")[-1]["update"] == 8
    run_tune(tmp_path / "until best", updates=2)  # the first probe after the start is the best one
    best, expected = weights_of(tmp_path / "run"), state_of(tmp_path / "until best", 2)
    assert all(torch.equal(best[key], expected[f"ema.{key}"]) for key in best)


def break_losses(monkeypatch, updates):
    """The teacher's losses of these updates (from 1) are not finite."""
    original, calls = teacher_module.teacher_loss, []

    def broken(*arguments):
        calls.append(1)
        return original(*arguments) * (float("nan") if len(calls) in updates else 1.0)

    monkeypatch.setattr(teacher_module, "teacher_loss", broken)


def test_an_update_that_is_not_finite_is_skipped_and_counted(tmp_path, monkeypatch):
    run_train(tmp_path / "three", updates=3, decay=1)
    break_losses(monkeypatch, {4})
    run_train(tmp_path / "four", updates=4, decay=1)
    before, after = state_of(tmp_path / "three", 3), state_of(tmp_path / "four", 4)
    assert all(torch.equal(before[key], after[key]) for key in before if key.startswith("model."))
    assert after["optimizer.model.z_proj.weight.step"].item() == 3
    assert [(line["skipped"], line["loss"] is None) for line in log_of(tmp_path / "four")] == [
        (0, False), (0, False), (0, False), (1, True),
    ]  # fmt: skip
    run_train(tmp_path / "four", resume=True, updates=5, decay=1)
    assert log_of(tmp_path / "four")[-1]["skipped"] == 1  # counted across a resume


def test_too_many_skipped_updates_in_a_row_stop_the_run_also_across_a_resume(tmp_path, monkeypatch):
    monkeypatch.setattr("marval.runtime.log.MOST_SKIPPED", 3)
    break_losses(monkeypatch, set(range(3, 99)))
    run_train(tmp_path, updates=4)
    with pytest.raises(ValueError, match=r"3 updates in a row up to update 5 .*lower the learning rate"):
        run_train(tmp_path, resume=True, updates=99)
    assert all(value.isfinite().all() for value in state_of(tmp_path, 4).values())
    assert load(tmp_path).sample([0]).isfinite().all()


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    original = teacher_module.update_ema

    @torch.no_grad()
    def breaks(ema, model, updates, decay):
        original(ema, model, updates, decay)
        if updates == 3:
            next(iter(ema.parameters())).fill_(float("nan"))

    monkeypatch.setattr(teacher_module, "update_ema", breaks)
    with pytest.raises(ValueError, match=r"not finite .*lower the learning rate"):
        run_train(tmp_path)
    assert load(tmp_path).sample([0]).isfinite().all()
    assert all(value.isfinite().all() for value in state_of(tmp_path, 2).values())


def test_weight_decay_shrinks_the_transformers_matrices_only():
    model = tiny_model()
    shrunk = decayed(model)
    for name, parameter in model.named_parameters():
        matrix = name.endswith("weight") and parameter.ndim == 2
        assert (parameter in shrunk) == (matrix and not name.startswith("diffloss") and "class_emb" not in name), name


def test_batches_cover_every_image_once_per_epoch():
    drawn = torch.cat([batch_indices(10, 4, update, seed=0) for update in range(5)])
    assert drawn[:10].sort().values.tolist() == drawn[10:].sort().values.tolist() == list(range(10))
    assert drawn[:10].tolist() != drawn[10:].tolist()


def test_the_learning_rate_rises_stays_and_falls():
    factors = [learning_rate_factor(update, 4, 5, 20) for update in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(factors[4:16]) == {1.0}
    assert factors[15:] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert [learning_rate_factor(update, 1, 2000, 4) for update in range(4)] == [1.0, 0.75, 0.5, 0.25]  # a short run
    assert learning_rate_factor(0, 1, 2000, -50) == 0.0  # never a step up the loss
