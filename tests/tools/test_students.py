"""The studies of distillation: other contexts, and chains of commands."""

import dataclasses
import subprocess

import pytest
import torch

import contexts
import students
from marval.cli import VERBS
from marval.cli.options import read
from marval.presets import DistillConfig
from marval.runtime.folder import open_run
from marval.sampling.orders import drawing_orders
from marval.train import distill
from marval.train.draws import gsim_draws
from tiny import tiny_config, tiny_data, tiny_model

SETTINGS = DistillConfig(updates=6, warmup=1, batch_size=4, tokens_per_image=4, autocast=False, guidance=1.7)


def test_in_the_order_of_the_sampler_targets_come_after_what_is_visible():
    config = dataclasses.replace(tiny_config(), order="spread")
    draws = gsim_draws(SETTINGS, config.mar, 3)
    ordered = contexts.in_order(SETTINGS, config.mar, 3, draws)
    order = drawing_orders("spread", config.mar.token_grid, range(12, 16))
    seen = torch.cat([ordered.visible, ordered.targets], dim=1)
    assert torch.equal(seen, order[:, : seen.shape[1]])
    assert ordered.visible.shape == draws.visible.shape


@pytest.mark.parametrize("groups", [1, 2])
def test_each_group_of_a_batch_has_a_mask_ratio_of_its_own(tmp_path, monkeypatch, groups):
    shapes = []
    monkeypatch.setattr(distill, "gsim_draws", contexts.prefix_draws)
    whole = contexts.in_groups(groups)

    def watched(*arguments):
        for part in whole(*arguments):
            shapes.append(part[2].visible.shape)
            yield part

    monkeypatch.setattr(distill, "masked_parts", watched)
    settings = dataclasses.replace(SETTINGS, accumulate=groups)
    with open_run(tmp_path / "run") as run:
        distill.distill(tiny_model(), tiny_config(), settings, tiny_data(), run)
    assert {rows for rows, _ in shapes} == {4 // groups}
    assert len(shapes) == 6 * groups
    assert len({visible for _, visible in shapes}) > 1


def test_own_pictures_take_the_place_of_real_ones(tmp_path, monkeypatch):
    own, seen = contexts.OwnPictures(0.5), []
    monkeypatch.setattr(contexts, "FIRST", 2)

    def watched(*arguments):
        for part in own.parts(*arguments):
            seen.append(part[2])
            yield part

    real = []
    original = distill.masked_parts

    def remembered(*arguments):
        for part in original(*arguments):
            real.append(part[2])
            yield part

    own.masked_parts = remembered
    monkeypatch.setattr(distill, "copy_networks", own.copied)
    monkeypatch.setattr(distill, "masked_parts", watched)
    with open_run(tmp_path / "run") as run:
        distill.distill(tiny_model(), tiny_config(), SETTINGS, tiny_data(), run)
    changed = [(a.tokens != b.tokens).flatten(1).any(dim=1).tolist() for a, b in zip(seen, real, strict=True)]
    assert changed == [[False] * 4] * 3 + [[True, True, False, False]] * 3
    assert torch.equal(own.labels, torch.arange(4) % 2)


@pytest.mark.parametrize("name", students.CHAINS)
def test_the_commands_of_a_chain_are_marvals_own(name, tmp_path, monkeypatch):
    typed = []

    class Process:
        def __init__(self, command, **_):
            typed.append(command[1:])

        def wait(self, seconds=None):
            return 0

    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(students, "updates_in", lambda folder: 1000)
    students.CHAINS[name](students.Chain(name, tmp_path, 60.0, "cpu", ["--batch-size", "8"]))
    assert typed
    for script, *words in typed:
        words = words[1:] if script == "-m" else words[2:]  # "marval", or an option of contexts.py
        read(VERBS[words[0]], words[1:], "marval")
