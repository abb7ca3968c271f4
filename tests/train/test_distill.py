"""A step of distillation: where gradients flow, which levels are drawn, what is frozen when, which w is distilled."""

import copy
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from marval.config import OneStep
from marval.data import ImageData
from marval.losses.energy import energy_score
from marval.losses.gsim import theta_loss
from marval.model import NoiseSchedule, TokenHead
from marval.pipeline import Pipeline, load
from marval.presets import DistillConfig
from marval.runtime.folder import open_run
from marval.runtime.rng import generator
from marval.sampling import DrawInOneStep, draw_counts, guidance_at, sample
from marval.train import distill as distill_module
from marval.train.distill import Inputs, distill, energy_scores, predicted_eps, revealed_after, student_tokens
from marval.train.draws import EnergyDraws, gsim_draws
from small import randn
from tiny import tiny_config, tiny_data, tiny_model

FULL = NoiseSchedule.full()
SETTINGS = DistillConfig(updates=4, warmup=1, batch_size=4, tokens_per_image=4, autocast=False, guidance=1.7)


def small_head(name, learn_variance):
    """A head in which nothing is zero, so that it answers to all its inputs."""
    head, rng = TokenHead(3, 6, 16, 2, learn_variance), generator("head", name)
    head.initialize(rng)
    with torch.no_grad():
        for weight in head.parameters():
            weight += 0.2 * torch.randn(weight.shape, generator=rng)
    return head.requires_grad_(False)


@pytest.mark.parametrize(("objective", "learn_variance"), [("gsim", False), ("sim", True), ("sid", False)])
def test_gradients_reach_x_t_through_teacher_and_phi(objective, learn_variance):
    rng = generator("step")
    x_0, contexts = torch.randn(16, 3, generator=rng).requires_grad_(True), torch.randn(2, 16, 6, generator=rng)
    t, eps = torch.randint(20, 981, (16,), generator=rng), torch.randn(16, 3, generator=rng)
    teacher, phi = (small_head(name, learn_variance) for name in ("teacher", "phi"))
    x_t = FULL.add_noise(x_0, eps, t)
    teacher_eps, phi_eps = predicted_eps(teacher, x_t, t, contexts, 1.7), predicted_eps(phi, x_t, t, contexts[:1])
    conditional, null = (teacher(x_t, t.float(), context)[:, :3] for context in contexts)
    torch.testing.assert_close(teacher_eps, null + 1.7 * (conditional - null))

    def gradient(teacher_eps, phi_eps):
        return torch.autograd.grad(theta_loss(objective, teacher_eps, phi_eps, eps)[0], x_0, retain_graph=True)[0]

    both = gradient(teacher_eps, phi_eps)
    for other in (gradient(teacher_eps.detach(), phi_eps), gradient(teacher_eps, phi_eps.detach())):
        assert (both - other).abs().max() > 0.01 * both.abs().max()


def test_levels_are_uniform_over_20_to_980_for_theta_and_over_all_for_phi():
    settings = DistillConfig(batch_size=2000, tokens_per_image=16, mask_ratio_min=0.99)
    draws = gsim_draws(settings, tiny_config().mar, 0)
    for (low, high), levels in (((20, 980), draws.theta), ((0, 999), draws.phi[0]), ((0, 999), draws.phi[1])):
        t = levels.t.flatten().float()
        assert len(t) == 32_000
        assert (t.min(), t.max()) == (low, high)
        assert abs(t.mean() - (low + high) / 2) < 4 * (high - low) / (12 * len(t)) ** 0.5
        assert abs(levels.eps.mean()) < 0.01


@pytest.mark.parametrize("objective", ["gsim", "sim", "sid"])
def test_the_teacher_is_frozen_always_and_phi_in_thetas_step(objective, tmp_path, monkeypatch):
    teacher, config = tiny_model(), tiny_config()
    before, jobs = copy.deepcopy(teacher.state_dict()), []

    def spy(head, x_t, t, contexts, guidance=1.0):
        (learns,) = {parameter.requires_grad for parameter in head.parameters()}
        assert not contexts.requires_grad
        jobs.append((x_t.requires_grad, learns))
        return predicted_eps(head, x_t, t, contexts, guidance)

    monkeypatch.setattr(distill_module, "predicted_eps", spy)
    images = ImageData(tiny_data().images[:12], tiny_data().labels[:12], config.class_names)
    with open_run(tmp_path) as run:
        distill(teacher, config, dataclasses.replace(SETTINGS, objective=objective, learning_rate=1e-3), images, run)
    theta, phi = [(True, False)] * 2, [(False, True)] * 2  # the teacher's and phi's eps; two steps of phi
    assert jobs == phi + 3 * (theta + phi)  # the warm-up belongs to phi
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_student_records_the_guidance_that_it_was_distilled_with(tmp_path):
    config = tiny_config()
    for name, w in (("given", 1.7), ("own", None)):
        with open_run(tmp_path / name) as run:
            distill(tiny_model(), config, dataclasses.replace(SETTINGS, updates=2, guidance=w), tiny_data(), run)
        draw = load(tmp_path / name).config.draw
        assert draw == OneStep(755, True, w or config.draw.guidance, config.draw.guidance_schedule)


@pytest.mark.parametrize("objective", ["gsim", "sim"])
def test_a_student_may_take_any_guidance_of_a_range(objective, tmp_path):
    """It starts where the teacher is; then w of every image guides its teacher, and reaches its head and phi."""
    teacher, config = tiny_model(), tiny_config()
    settings = dataclasses.replace(SETTINGS, guidance_range=(1.0, 4.0), objective=objective, updates=6, decay=1)
    with open_run(tmp_path / "whole") as run:
        distill(teacher, config, settings, tiny_data(), run)
    with open_run(tmp_path / "parts") as run:
        distill(teacher, config, dataclasses.replace(settings, updates=3), tiny_data(), run)
    with open_run(tmp_path / "parts", resume=True) as run:
        distill(teacher, config, settings, tiny_data(), run)
    student, again = load(tmp_path / "whole"), load(tmp_path / "parts")
    assert student.config.mar.guidance_range == (1.0, 4.0)
    assert all(torch.equal(a, b) for a, b in zip(student.model.parameters(), again.model.parameters(), strict=True))
    state = load_file(next((tmp_path / "whole").glob("state-*/*.safetensors")))
    for network in ("student.diffloss.net", "auxiliary"):
        assert state[f"{network}.guidance_embed.mlp.2.weight"].abs().max() > 0


@pytest.mark.parametrize("guidance_range", [None, (1.0, 4.0)])
def test_the_energy_score_moves_a_student_to_its_teacher(guidance_range, tmp_path):
    """Both tokens of an image are scored, by the teacher's samples in the same contexts and under the same w."""
    teacher, config = tiny_model(), tiny_config()
    settings = dataclasses.replace(
        SETTINGS, energy=1.0, energy_tokens=2, energy_steps=5, guidance_range=guidance_range, updates=5, decay=1,
        tokens_per_image=3, log_every=1,
    )  # fmt: skip
    for name, stops in (("whole", (5,)), ("parts", (2, 5))):
        for updates in stops:
            with open_run(tmp_path / name, resume=updates != stops[0]) as run:
                distill(teacher, config, dataclasses.replace(settings, updates=updates), tiny_data(), run)
    parameters = zip(*(load(tmp_path / name).model.parameters() for name in ("whole", "parts")), strict=True)
    assert all(torch.equal(whole, parts) for whole, parts in parameters)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert ["energy" in row for row in rows] == [False, True, True, True, True]  # the warm-up belongs to phi


@pytest.mark.parametrize("network", [{}, {"joint_draw": True}, {"joint_draw": True, "cached": True}])
def test_an_update_draws_what_the_sampler_draws(network):
    model, draw, labels = tiny_model(**network), DrawInOneStep(OneStep(temperature=0.8)), torch.tensor([0, 1, 0])
    order = torch.stack([torch.randperm(16, generator=generator("order", i)) for i in range(3)])
    index, noise = order[..., None].expand(-1, -1, 4), randn(3, 16, 4)
    tokens = sample(model, draw, model.embed(labels), iterations=1, seeds=0, noise=noise[None])
    inputs = Inputs(torch.zeros(3, 16, 4), order[:, :0], order, labels)
    x_0, _ = student_tokens(model, draw, inputs, 1.0, noise.gather(1, index).flatten(0, 1), False)
    torch.testing.assert_close(x_0, tokens.gather(1, index).flatten(0, 1))


def test_energy_scores_are_of_the_first_targets_of_every_image():
    images, targets, count, samples, steps = 3, 4, 2, 5, 6
    c, c_theta = randn(2, images * targets, 7), randn(1, images * targets, 7)
    w, noise = randn(images * targets), EnergyDraws(randn(steps, images * count, 3), randn(samples, images * count, 3))
    calls = []

    def draw(contexts, guidance, z):
        calls.append((contexts, guidance, z))
        return z[0]

    scores = energy_scores((draw, c), (draw, c_theta), w, noise, images)
    rows = [image * targets + target for image in range(images) for target in range(count)]
    (of_teacher, of_student) = calls
    for given, expected in zip(of_teacher, (c[:, rows], w[rows], noise.teacher), strict=True):
        assert torch.equal(given, expected)
    for given, expected in zip(of_student[:2], (c_theta[:, rows * samples], w[rows * samples]), strict=True):
        assert torch.equal(given, expected)
    torch.testing.assert_close(scores, energy_score(noise.student, noise.teacher[0]))


def test_the_guidance_of_a_range_is_each_images_own():
    settings = dataclasses.replace(SETTINGS, batch_size=4000)
    mar = dataclasses.replace(tiny_config().mar, guidance_range=(1.0, 4.0))
    w = gsim_draws(settings, mar, 0).guidance
    assert 1.0 <= w.min() < 1.01 < 3.99 < w.max() <= 4.0
    assert abs(w.log2().mean() - 1.0) < 0.03  # log-uniform
    part = gsim_draws(settings, mar, 0).part(slice(7, 9))
    assert torch.equal(part.guidance, w[7:9].repeat_interleave(part.targets.shape[1]))
    head, rng = small_head("teacher", False), generator("own w")
    x_t, contexts = torch.randn(8, 3, generator=rng), torch.randn(2, 8, 6, generator=rng)
    t = torch.arange(8) * 100
    together = predicted_eps(head, x_t, t, contexts, w[:8])
    for i in range(8):
        alone = predicted_eps(head, x_t[i : i + 1], t[i : i + 1], contexts[:, i : i + 1], w[i].item())
        torch.testing.assert_close(together[i : i + 1], alone)


def test_a_head_that_begins_to_take_guidance_answers_as_before():
    head, rng = small_head("teacher", False), generator("begins")
    x_t, context, t = torch.randn(8, 3, generator=rng), torch.randn(8, 6, generator=rng), torch.arange(8.0)
    guided, w = copy.deepcopy(head).take_guidance((1.0, 4.0)), torch.linspace(1, 4, 8)
    assert torch.equal(guided(x_t, t, context, w), head(x_t, t, context))
    torch.nn.init.normal_(guided.guidance_embed.mlp[2].weight, generator=rng)
    answers = guided(x_t, t, context, w)
    assert (answers - head(x_t, t, context)).abs().amax(dim=1).min() > 0.01
    for i, each in enumerate(w.tolist()):
        alone = guided(x_t[i : i + 1], t[i : i + 1], context[i : i + 1], each)
        torch.testing.assert_close(alone, answers[i : i + 1])


def test_a_range_of_guidance_is_learned(tmp_path):
    """Two w of a student differ as its teacher's do, of which the class says much."""
    teacher, config = tiny_model(), tiny_config()
    with torch.no_grad():
        for weight in (
            teacher.class_emb.weight,
            teacher.head.cond_embed.weight,
            teacher.head.final_layer.linear.weight,
        ):
            weight *= 5
    settings = dataclasses.replace(
        SETTINGS, guidance_range=(1.0, 4.0), energy=1.0, energy_tokens=4, energy_steps=10, updates=150, batch_size=32,
        learning_rate=2e-3, auxiliary_learning_rate=2e-3, decay=50, ema_decay=0.9,
    )  # fmt: skip
    with open_run(tmp_path) as run:
        distill(teacher, config, settings, tiny_data(), run)
    student, shifts = load(tmp_path), []
    teacher = Pipeline(teacher.eval(), config)
    for pipeline in (teacher, student):
        means = [
            torch.stack([pipeline.sample_tokens([0] * 64, seeds=seed, iterations=1) for seed in (0, 64)]).mean((0, 1))
            for pipeline in (pipeline.with_draw(guidance=w, guidance_schedule="constant") for w in (1.0, 4.0))
        ]
        shifts.append((means[1] - means[0]).flatten())
    assert torch.nn.functional.cosine_similarity(*shifts, dim=0) > 0.5


def test_a_cached_student_first_learns_its_teachers_contexts(tmp_path):
    """Also when it is interrupted meanwhile."""
    teacher, config = tiny_model(), tiny_config()
    settings = dataclasses.replace(
        SETTINGS, cached=True, updates=43, warmup=40, decay=1, log_every=1, batch_size=16, learning_rate=1e-3,
        probe_every=15,
    )  # fmt: skip
    with open_run(tmp_path / "whole") as run:
        distill(teacher, config, settings, tiny_data(), run)
    with open_run(tmp_path / "parts") as run:
        assert distill(teacher, config, settings, tiny_data(), run, lambda _: run.workers.stop.set() or {}) == 16
    with open_run(tmp_path / "parts", resume=True) as run:
        distill(teacher, config, settings, tiny_data(), run)
    student, again = load(tmp_path / "whole"), load(tmp_path / "parts")
    assert student.config.mar.cached
    assert all(torch.equal(a, b) for a, b in zip(student.model.parameters(), again.model.parameters(), strict=True))
    rows = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [{"context", "l1"} & row.keys() for row in rows] == [{"context"}] * 40 + [{"l1"}] * 3
    assert sum(row["context"] for row in rows[30:40]) < 0.5 * sum(row["context"] for row in rows[:10])


def test_the_groups_of_an_update_are_those_of_a_sampler():
    settings = dataclasses.replace(SETTINGS, tokens_per_image=24, batch_size=1)
    mar = dataclasses.replace(tiny_config().mar, token_grid=(7, 7), cached=True)
    first, inpainted, most = set(), 0, set()
    for update in range(300):
        draws = gsim_draws(settings, mar, update)
        groups, visible = draws.groups, draws.visible.shape[1]
        assert sum(groups.visible) == visible
        assert sum(groups.hidden) == draws.targets.shape[1]
        assert groups.hidden == sorted(groups.hidden, reverse=True)
        inpainted += groups.visible[0] > 0
        most.add(len(groups.visible))
        plain = gsim_draws(settings, dataclasses.replace(mar, cached=False), update)
        assert plain.groups is None
        assert torch.equal(plain.visible, draws.visible)
        assert torch.equal(plain.phi[1].eps, draws.phi[1].eps)
        first.add(groups.hidden[0])
    assert 60 < inpainted < 180
    assert max(most) > 40
    assert {1, 2, 3, 4, 24} <= first


@pytest.mark.parametrize("iterations", [4, 16])
@pytest.mark.parametrize("tokens", [49, 256])
def test_the_mean_guidance_of_distillation_is_the_samplers(tokens, iterations):
    """Over the tokens of an image, w = 3, linear: K = 4 gives 2.3, where counting before the draw gave 1.7."""
    revealed = sampled = distilled = 0
    for count in draw_counts(tokens, iterations):
        after = min(revealed + count, tokens - 1) / tokens
        sampled += guidance_at(3.0, "linear", after) * count / tokens
        distilled += guidance_at(3.0, "linear", revealed_after(revealed, tokens, iterations)) * count / tokens
        revealed += count
    assert distilled == pytest.approx(sampled, rel=0.01)
    assert sampled == pytest.approx({4: 2.3, 16: 2.08}[iterations], abs=0.02)
