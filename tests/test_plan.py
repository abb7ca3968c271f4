"""`tools/plan.py`: parameters are the networks', memory is what a step takes, arithmetic is what torch counts."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import marval.sampling.loop
from marval.config import MARConfig
from marval.evaluate.memory import LiveMemory
from marval.evaluate.results import write_results
from marval.model import MAR
from marval.presets import DistillConfig, TuneConfig
from marval.runtime.rng import generator
from marval.sampling import DrawInOneStep, model_contexts, sample
from marval.train.draws import masked_count
from plan import (
    GIB,
    cache_bytes,
    distill_memory,
    mean_mask_ratio,
    plan_distill,
    plan_rows,
    plan_tune,
)
from tables import plan as plan_table
from tiny import tiny_config, tiny_model

BASE = MARConfig.imagenet256("base")
ROOT = Path(__file__).parents[1]


def test_live_memory_counts_what_is_alive_and_the_most_there_was():
    with LiveMemory() as live:
        first = torch.zeros(1000)
        second = first * 2
        view = second[:10]
        assert live.now == 8000  # a view holds no memory of its own
        del first, second
        assert live.now == 4000
        del view
    assert (live.now, live.peak) == (0, 8000)


@pytest.mark.parametrize(("low", "spread"), [(0.7, 0.25), (0.0, 0.6)])
def test_the_mean_mask_ratio_is_that_of_the_draws(low, spread):
    settings = DistillConfig(mask_ratio_min=low, mask_ratio_std=spread)
    rng = generator("mask ratios")
    drawn = [masked_count(10_000, low, spread, rng) / 10_000 for _ in range(4000)]
    assert mean_mask_ratio(settings) == pytest.approx(sum(drawn) / len(drawn), abs=0.01)


def test_a_plan_adds_up():
    plan = plan_distill(tiny_config().mar, DistillConfig(batch_size=64), gpus=4)
    model = tiny_model()
    total, head = (sum(p.numel() for p in network.parameters()) for network in (model, model.head))
    assert plan.parameters == {"student": total, "EMA": total, "teacher": total, "auxiliary": head}
    assert plan.weights == 4 * (3 * total + head) // 4
    assert plan.optimizer == 2 * plan.gradients
    assert plan.peak(4, False) - plan.peak(3, False) == plan.activations[False][1]
    fit = plan.images_that_fit(plan.peak(7, False), False)
    assert fit == 7
    assert plan.bf16_flops + plan.float32_flops == plan.flops
    assert plan.seconds(4, 1e12, 0.5, math.inf) == pytest.approx(plan.bf16_flops * plan.steps / 2e12)
    assert plan.seconds(4, math.inf, 0.5, 1e12) == pytest.approx(plan.float32_flops * plan.steps / 3.2e12)
    slow = plan_distill(tiny_config().mar, DistillConfig(batch_size=64, autocast=False), gpus=4)
    assert (slow.bf16_flops, slow.float32_flops) == (0, plan.flops)
    assert plan_distill(tiny_config().mar, DistillConfig(batch_size=128), gpus=4).flops == 2 * plan.flops


def test_recomputation_saves_memory_and_costs_arithmetic():
    settings, short = DistillConfig.imagenet256("base"), dataclasses.replace(BASE, encoder_depth=4, decoder_depth=4)
    assert distill_memory(BASE, settings, 8, True) < 0.7 * distill_memory(BASE, settings, 8, False)
    kept = dataclasses.replace(settings, checkpoint_blocks=False)
    assert plan_distill(short, kept, 8).flops < plan_distill(short, settings, 8).flops


def test_a_tuning_step_costs_what_torch_counts(monkeypatch):
    """The last iteration with gradients: forward once more, and twice that backward."""
    config = tiny_config().mar
    settings = TuneConfig(iterations=1, gradient_iterations=1, batch_size=1)
    model = tiny_model().requires_grad_(True)
    monkeypatch.setattr("marval.sampling.fast.ONEDNN", False)
    places = torch.arange(16)[None]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        nothing = torch.zeros(1, 0, dtype=torch.long)
        labels = torch.zeros(1, dtype=torch.long)
        context = model_contexts(model, torch.zeros(1, 16, 4), nothing, places, labels, guided=False)[0]
        embedded = model.head.embed_context(context) + model.head.embed_time(torch.tensor([755.0]))
        model.head.denoise(torch.zeros(16, 4), embedded).sum().backward()
    planned = plan_tune(config, settings, 1).flops * 3 / 4  # the counter saw no recomputation
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.03)  # inputs without gradients save a little


def test_the_cache_takes_32_kib_an_image():
    assert cache_bytes(images=1000) == 1000 * 32 * 1024


@pytest.mark.slow
def test_the_command_answers_without_allocating():
    script = (
        f"import resource, sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import plan;"
        "plan.main(('imagenet256-huge',));"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    *lines, peak = run.stdout.splitlines()
    text = "\n".join(lines)
    assert "student 942.4M" in text
    assert "42.0 GB" in text
    assert text.count("days at 35% of 312 TFLOP/s in bf16 and 80% of 19.5 in float32") == 2
    assert int(peak) * 1024 < 2 * GIB  # the weights of one network alone are 3.5 GiB


def test_a_plan_is_kept_and_becomes_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr("plan.distill_memory", lambda config, settings, images, recompute: 2**30 + 2**20 * images)
    monkeypatch.setattr("plan.tune_memory", lambda config, settings, images, recompute: 2**20 * images)
    rows = plan_rows("base", 4, 24 * GIB, 165e12, 0.5, 10e12)
    write_results(tmp_path / "plan.json", "plan", rows, 0)
    assert [row["stage"] for row in rows] == ["distill", "tune"]
    assert rows[0]["kept_image_mib"] == 1.0
    slow = rows[0]["float32_pflop_per_step"]
    seconds = (rows[0]["pflop_per_step"] - slow) / (0.165 * 0.5) + slow / (0.01 * 0.8)
    assert rows[0]["days"] == pytest.approx(seconds * rows[0]["steps"] / 4 / 86400)
    header, _, memory, activations, fit, *work = plan_table(tmp_path / "plan.json").splitlines()
    assert header == "|  | imagenet256-base |"
    total = sum(rows[0][f"{name}_gib"] for name in ("weights", "gradients", "optimiser", "gathered"))
    assert memory.endswith(f"| {total:.2f} |")
    assert activations.endswith("| 1 / 1 |")
    assert fit.endswith("in 24 GiB, with `--checkpoint-blocks` | 512 |")
    assert work[0].startswith("| PFLOP a step of 2,048 images; days for 18,767 steps | 1.29; ")
    assert work[1].startswith("| tune: PFLOP a step of 256 images; days for 25,022 steps | 0.65; ")


def tuning_peak(config, iterations, learnt):
    """Bytes that a tuning step of one image adds at its peak: K iterations, gradients through the last M, `learnt`."""
    model = MAR(config).initialize(generator("peak")).eval()
    with LiveMemory() as live:
        tokens = sample(
            model, DrawInOneStep(), torch.tensor([0]), iterations=iterations, seeds=[0], gradient_iterations=learnt
        )
        tokens.square().sum().backward()
    return live.peak


def test_blocks_or_iterations_are_computed_again_and_never_both():
    """With the preset's `checkpoint_blocks` the context of each of the last M iterations is computed twice."""
    labels, calls = torch.tensor([0, 1]), []
    found = []
    for blocks in (False, True):
        model = tiny_model().requires_grad_(True)
        model.checkpoint_blocks = blocks
        calls.clear()
        model.decoder_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
        tokens = sample(
            model, DrawInOneStep(), labels, iterations=4, seeds=[0, 1], gradient_iterations=2, autocast=False
        )
        tokens.square().sum().backward()
        assert len(calls) == 4 + 2
        found.append([parameter.grad for parameter in model.parameters()])
    for first, second in zip(*found, strict=True):
        assert (first is None) == (second is None)
        if first is not None:
            torch.testing.assert_close(first, second)


SMALL = dataclasses.replace(
    BASE, encoder_dim=96, encoder_depth=4, encoder_heads=4, decoder_dim=96, decoder_depth=4, decoder_heads=4,
    head_width=96, head_depth=3, num_classes=10,
)  # fmt: skip


@pytest.mark.parametrize(("config", "iterations"), [(SMALL, 8), pytest.param(BASE, 8, marks=pytest.mark.slow)])
def test_gradients_through_all_iterations_take_little_more_memory_than_through_one(config, iterations, monkeypatch):
    """As long as each is computed again in the backward pass; MAR-B's tokens, blocks and buffer."""
    one, all_of_them = (tuning_peak(config, iterations, learnt) for learnt in (1, iterations))
    monkeypatch.setattr(marval.sampling.loop, "checkpoint", lambda function, *inputs, **options: function(*inputs))
    kept_one, kept_all = (tuning_peak(config, iterations, learnt) for learnt in (1, iterations))
    shown = (f"{peak / 2**20:.0f} MiB" for peak in (one, all_of_them, kept_one, kept_all))
    print("M=1: {}, M=K: {}; without checkpointing M=1: {}, M=K: {}".format(*shown))
    assert all_of_them <= 1.5 * one
    assert kept_all > 1.5 * all_of_them


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "images"), [("distill", 1), ("distill", 4), ("tune", 1)])
def test_planned_memory_is_what_a_step_of_mar_base_takes(stage, images):
    """Measured peak of a process, less what it took before; at most 8 GiB, and within 15 % of the plan."""
    script = Path(__file__).parent / "full_size.py"
    run = subprocess.run(
        [sys.executable, script, stage, str(images)], capture_output=True, text=True, timeout=600, check=True
    )
    measured = json.loads(run.stdout.splitlines()[-1])
    took, planned = measured["bytes"], measured["planned_bytes"]
    print(f"{stage} of {images}: measured {took / GIB:.2f} GiB, planned {planned / GIB:.2f} GiB")
    assert took == pytest.approx(planned, rel=0.15)
    assert took < 8 * GIB or images > 1
