"""`tools/plan.py`: parameters are the networks', memory is what a step takes, arithmetic is what torch counts."""

import dataclasses
import json
from pathlib import Path
from statistics import mean

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import marval.sampling.loop
from marval.config import MARConfig
from marval.evaluate.results import read_results
from marval.model import MAR
from marval.presets import DistillConfig, TuneConfig
from marval.runtime.rng import generator
from marval.sampling import DrawInOneStep, sample
from marval.sampling.fast import cast_frozen
from marval.train.draws import masked_count
from marval.train.flops import gsim_flops
from plan import GIB, Meter, distill_step, main, row_of, tune_step
from tables import plan as plan_table
from tiny import tiny_config, tiny_model

BASE, TINY = MARConfig.imagenet256("base"), tiny_config().mar
ROOT = Path(__file__).parents[2]
MACHINE = {"gpus": 4, "gpu_gib": 24.0, "tflops": 160.0, "efficiency": 0.5, "shard": True}


def test_a_meter_counts_what_is_alive_the_most_there_was_and_operations_by_precision():
    x = torch.ones(2, 3)
    with Meter() as meter:
        first = torch.zeros(1000)
        second = first * 2
        view = second[:10]
        assert meter.now == 8000  # a view holds no memory of its own
        del first, second
        assert meter.now == 4000
        del view
        assert (meter.now, meter.peak) == (0, 8000)
        (x @ x.T), (x.bfloat16() @ x.T.bfloat16()), (x @ x.T)
    assert meter.flops == {torch.float32: 48, torch.bfloat16: 24}


def test_a_plan_adds_up():
    row = row_of("distill", TINY, DistillConfig(batch_size=64), MACHINE)
    model = tiny_model()
    total, head = (sum(p.numel() for p in network.parameters()) for network in (model, model.head))
    assert row["parameters"] == {"student": total, "EMA": total, "teacher": total, "auxiliary": head}
    assert row["weights_gib"] == pytest.approx(4 * (3 * total + head) / 4 / GIB)
    whole = row_of("distill", TINY, DistillConfig(batch_size=64), {**MACHINE, "shard": False})
    teacher = sum(parameter.nbytes for parameter in cast_frozen(model).parameters())
    assert whole["weights_gib"] == pytest.approx((4 * (2 * total + head) + teacher) / GIB)
    assert whole["gathered_gib"] == 0
    assert row["optimiser_gib"] == pytest.approx(2 * row["gradients_gib"])
    slow = row["float32_pflop_per_step"]
    seconds = (row["pflop_per_step"] - slow) / (0.160 * 0.5) + slow / (0.080 * 0.5)
    assert row["days"] == pytest.approx(seconds * row["updates"] / 4 / 86400)
    held = sum(row[f"{name}_gib"] for name in ("weights", "gradients", "optimiser", "gathered"))  # in several parts
    room = held + row["kept_fixed_gib"] + 7.5 * row["kept_image_mib"] / 1024
    small = row_of("distill", TINY, DistillConfig(batch_size=64), {**MACHINE, "gpu_gib": room})
    assert small["kept_images"] == 7


def test_recomputation_saves_memory_and_costs_arithmetic():
    short = dataclasses.replace(BASE, encoder_depth=4, decoder_depth=4)
    again, kept = (distill_step(short, DistillConfig.imagenet256("base"), 8, recompute, 200) for recompute in (1, 0))
    assert again.peak < 0.85 * kept.peak
    assert again.flops[torch.bfloat16] > kept.flops[torch.bfloat16]
    assert again.flops[torch.float32] == kept.flops[torch.float32]  # the head recomputes nothing


@pytest.mark.parametrize("guidance", [1.0, 1.2])
def test_a_run_logs_the_operations_that_a_plan_counts(guidance):
    settings = dataclasses.replace(DistillConfig.imagenet256("base"), guidance=guidance)
    with torch.device("meta"):
        model = MAR(BASE)
    masked = [masked_count(256, 0.7, 0.25, rng) for rng in [generator("flops")] for _ in range(100)]
    counted = sum(distill_step(BASE, settings, 1, False, round(mean(masked))).flops.values())
    assert gsim_flops(model, settings) == pytest.approx(counted, rel=0.03)


def test_a_tuning_step_costs_what_torch_counts_of_a_real_one():
    settings = TuneConfig(iterations=(4,), gradient_iterations=2, batch_size=1, autocast=False)
    model = tiny_model().requires_grad_(True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        condition = model.embed(torch.tensor([0]))
        drawn = sample(model, DrawInOneStep(), condition, iterations=4, seeds=[0], gradient_iterations=2)
        drawn.sum().backward()
    planned = sum(tune_step(TINY, settings, 1, False, 4).flops.values())
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.03)  # fused attention's backward differs a little


@pytest.mark.slow
def test_a_plan_is_printed_kept_and_becomes_a_table(tmp_path, capsys):
    main(("imagenet256-base",), out=tmp_path / "plan.json")
    text = capsys.readouterr().out
    assert "42.0 GB" in text
    results = read_results(tmp_path / "plan.json")
    row = results["plan"][0]
    assert text.startswith(plan_table(results))
    header, _, memory, activations, *_, tune = plan_table(results).splitlines()
    assert header == "|  | imagenet256-base |"
    total = sum(row[f"{name}_gib"] for name in ("weights", "optimiser", "gathered"))
    assert memory.endswith(f"| {total:.2f} |")
    assert activations.endswith(f"| {row['kept_image_mib']:.0f} / {row['recomputed_image_mib']:.0f} |")
    assert tune.startswith("| tune: PFLOP an update of 256 images")


def tuning_peak(config, learnt):
    """Bytes that a tuning step of one image adds at its peak: K = 8 iterations, gradients through the last `learnt`."""
    model = MAR(config).initialize(generator("peak")).eval()
    with Meter() as meter:
        condition = model.embed(torch.tensor([0]))
        tokens = sample(model, DrawInOneStep(), condition, iterations=8, seeds=[0], gradient_iterations=learnt)
        tokens.square().sum().backward()
    return meter.peak


def test_gradients_through_all_iterations_take_little_more_memory_than_through_one(monkeypatch):
    """As long as each is computed again in the backward pass; MAR-B's tokens and buffer."""
    sizes = {"encoder_dim": 96, "encoder_depth": 4, "encoder_heads": 4, "decoder_dim": 96, "decoder_depth": 4}
    sizes |= {"decoder_heads": 4, "head_width": 96, "head_depth": 3, "num_classes": 10}
    small = dataclasses.replace(BASE, **sizes)
    one, all_of_them = tuning_peak(small, 1), tuning_peak(small, 8)
    monkeypatch.setattr(marval.sampling.loop, "checkpoint", lambda function, *inputs, **options: function(*inputs))
    assert all_of_them <= 1.5 * one
    assert tuning_peak(small, 8) > 1.5 * all_of_them


@pytest.mark.slow
@pytest.mark.parametrize(("size", "compiled"), [("base", False), ("base", True), ("huge", False)])
def test_planned_memory_is_what_an_h200_took(size, compiled, unchecked):
    """Every update of GSIM that was measured is within 15 % of the plan."""
    measured = json.loads((ROOT / "results" / "gpu-h200.json").read_text())
    settings = dataclasses.replace(DistillConfig.imagenet256(size), compile=compiled)
    row = row_of("distill", MARConfig.imagenet256(size), settings, {**MACHINE, "shard": False})
    held, seen = row["weights_gib"] + row["optimiser_gib"], 0
    for name, took in measured.items():
        if name.startswith(f"gsim {size}") and took["compiled"] == compiled:
            kind = "recomputed" if took["checkpoint_blocks"] else "kept"
            activations = row[f"{kind}_fixed_gib"] + took["batch"] * row[f"{kind}_image_mib"] / 1024
            assert held + activations == pytest.approx(took["bytes"] / GIB, rel=0.15), name
            seen += 1
    assert seen >= 1
