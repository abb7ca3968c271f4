"""Tuning's parts: rewards and what may be wrong with them, prompts, the keeper, low rank, precision."""

import dataclasses

import pytest
import torch

from marval.config import OneStep
from marval.pipeline import Pipeline, load
from marval.presets import TuneConfig
from marval.rewards import ClassifierReward, Prompt, WeightedReward, prompts_of
from marval.rewards.classifier import Classifier
from marval.runtime.distributed import Workers
from marval.runtime.rng import generator
from marval.sampling import DrawInOneStep, draw_function, sample
from marval.train.anchor import anchor_of
from marval.train.draws import tune_draws
from marval.train.keeper import Keeper
from marval.train.low_rank import add_low_rank, merged
from marval.train.tune import trainable
from tiny import tiny_config, tiny_data, tiny_model
from training import DISTILL, STUDENT, TUNE, brightness, log_of, run_distance, run_tune, state_of


@pytest.mark.parametrize("template", ["{}", "no class", "car: {}"])
def test_the_classifier_judges_the_class_that_was_asked_for(template):
    names = ("car", "shirt", "t-shirt", "a {} b")
    classifier = Classifier("plain", 1, names).eval()
    images = torch.rand(len(names), 1, 28, 28, generator=generator("images"))
    labels = list(reversed(range(len(names))))
    rewards = ClassifierReward(classifier)(images, prompts_of(template, names, labels))
    expected = classifier(images).log_softmax(dim=1)[torch.arange(len(names)), labels]
    torch.testing.assert_close(rewards, expected)


def test_a_prompt_is_a_text_that_knows_its_class_and_others_are_refused():
    prompt = Prompt.of("a picture of {}, or {}", "a {x} b")
    assert prompt == "a picture of a {x} b, or a {x} b"
    assert prompt.class_name == "a {x} b"
    for template in ("{x}", "a {class}", "{0} {}"):
        with pytest.raises(ValueError, match="no other braces"):
            Prompt.of(template, "bag")
    reward = ClassifierReward(Classifier("plain", 1, ("car", "dog")))
    for prompt, unknown in (("a car", "''"), (Prompt.of("a {}", "cat"), "'cat'")):
        with pytest.raises(
            ValueError, match=rf"not know the class {unknown} .*: it tells car, dog apart; .* --reward classifier:FILE"
        ):
            reward(torch.zeros(1, 1, 28, 28), [prompt])


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda images, prompts: images.mean(), "expected one number per image"),
        (lambda images, prompts: images.detach().mean(dim=(1, 2, 3)), "no gradient"),
    ],
)
def test_a_bad_reward_is_named(reward, message, tmp_path):
    with pytest.raises(ValueError, match=f"reward mine: .*{message}"):
        run_tune(tmp_path, reward=WeightedReward({"mine": (reward, 1.0)}))
    load(tmp_path)  # the student that it started from


def test_a_reward_that_becomes_nan_names_the_prompt_and_keeps_state_and_model(tmp_path):
    calls = []

    def breaks(images, prompts):
        calls.append(1)
        broken = torch.tensor(["square" in prompt for prompt in prompts])
        return torch.where(broken, torch.nan, brightness(images, prompts)) if len(calls) > 3 else images.mean((1, 2, 3))

    with pytest.raises(ValueError, match=r"reward mine: not finite for the prompt 'a high-quality .* square'"):
        run_tune(tmp_path, reward=WeightedReward({"mine": (breaks, 1.0)}), updates=99, batch_size=8)
    assert all(value.isfinite().all() for value in state_of(tmp_path, 2).values())
    assert load(tmp_path).sample([0]).isfinite().all()


def test_the_keeper_uses_the_figures_that_there_are():
    def see(*figures):
        keeper = Keeper(TuneConfig(patience=2))
        return [keeper.see(one) for one in figures], keeper.stopped

    assert see({"fd": 1.0}, {"fd": 1.05}, {"fd": 1.0}) == ([True, True, True], "")
    assert see({"fd": 1.0}, {"fd": 1.2})[1].startswith("the Fréchet distance rose to 1.20")
    assert see({"fd": 1.0, "diversity": 2.0}, {"fd": 1.0, "diversity": 1.0})[1].startswith("the diversity fell")
    best, why = see(*({"fd": 1.0, "held_out": x, "log_probability": -x} for x in (0.1, 0.3, 0.2, 0.2)))
    assert best == [True, True, False, False]  # by the held-out reward, though the classifier disagrees
    assert "held-out reward did not rise in 2 probes" in why


def test_where_distances_alone_are_tuned_the_lowest_held_out_one_is_best():
    keeper = Keeper(TuneConfig(patience=2), by_distance=True)
    figures = [{"fd": fd, "log_probability": -float(i)} for i, fd in enumerate((1.0, 0.8, 0.9, 0.85))]
    assert [keeper.see(one) for one in figures] == [True, True, False, False]
    assert keeper.stopped == "the held-out distance did not fall in 2 probes"
    keeper = Keeper(TuneConfig(), by_distance=True)
    assert [keeper.see({"fd": fd, "held_out": x}) for fd, x in ((1.0, 1.0), (0.9, 0.0), (1.0, 2.0))] == [
        True,
        False,
        True,
    ]


def test_for_a_distance_all_classes_have_the_same_share():
    config = dataclasses.replace(
        tiny_config(), class_names=tuple("abc"), mar=dataclasses.replace(tiny_config().mar, num_classes=3)
    )
    settings = dataclasses.replace(TUNE, batch_size=4, moments_batches=2)
    batches = [tune_draws(settings, config, u, distances=True, batch=i) for u in range(3) for i in range(3)]
    labels, _, noise, _ = zip(*batches, strict=True)
    assert torch.cat(labels).bincount().tolist() == [12, 12, 12]
    assert len({float(x.sum()) for x in noise}) == 9


def test_for_a_distance_a_student_with_a_dial_draws_at_its_own_guidance():
    config = tiny_config()
    config = dataclasses.replace(config, mar=dataclasses.replace(config.mar, guidance_range=(1.0, 4.0)))
    assert tune_draws(TUNE, config, 0)[3] is not None
    assert tune_draws(TUNE, config, 0, distances=True)[3] is None


def test_a_distance_falls_after_the_moments_are_gathered(tmp_path):
    run_distance(tmp_path, updates=24, moments_warmup=4, batch_size=16, learning_rate=3e-3)
    log = {line["update"]: line for line in log_of(tmp_path)}
    assert "reward" not in log[4]  # the student does not learn yet
    assert log[5]["reward"] == pytest.approx(-1, abs=0.3)  # in units of the distance at its start
    assert log[24]["fd:pixels"] < 0.8 * log[5]["fd:pixels"]
    run_distance(
        tmp_path / "in turn", updates=24, moments_warmup=4, batch_size=16, learning_rate=3e-3, iterations=(4, 1)
    )
    log = {line["update"]: line for line in log_of(tmp_path / "in turn")}
    assert all(log[last]["fd:pixels"] < 0.8 * log[first]["fd:pixels"] for first, last in ((5, 23), (6, 24)))
    assert [log[update]["iterations"] for update in (1, 2, 3)] == [4, 1, 4]
    with pytest.raises(ValueError, match="--updates 4: expected more than the 4 of --moments-warmup"):
        run_distance(tmp_path / "never", updates=4, moments_warmup=4)


def test_the_teacher_of_a_student_that_draws_jointly_may_be_its_anchor():
    model = tiny_model(joint_draw=True, cached=True, guidance_range=(1.0, 3.0))
    student, teacher = (
        Pipeline(model, dataclasses.replace(STUDENT, mar=model.config)), Pipeline(tiny_model(), tiny_config())
    )  # fmt: skip
    assert anchor_of(teacher, student, tiny_data(), DISTILL, TUNE).teacher is teacher.model


def test_low_rank_factors_reach_every_use_of_a_weight_and_merge(monkeypatch):
    """Also where a block multiplies by slices of its weight."""
    plain, network = tiny_model(), add_low_rank(tiny_model(), 2, seed=0)
    draw = draw_function(dataclasses.replace(tiny_config(), draw=OneStep()))

    def drawn(model, **how):
        return sample(model, draw, model.embed(torch.tensor([0, 1])), iterations=3, seeds=[1, 2], **how)

    before = drawn(plain)
    assert torch.equal(drawn(network), before)
    factors = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert all(name.endswith((".a", ".b")) for name in factors)
    drawn(network, gradient_iterations=3).square().sum().backward()
    reached = {name for name, p in factors.items() if name.endswith(".b") and "res_blocks" not in name}
    assert any("decoder_blocks.1.attn.qkv" in name for name in reached)
    assert all(factors[name].grad.any() for name in reached)  # the gates of the head's blocks are closed at first
    for parameter in factors.values():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    changed = drawn(network)
    assert (changed - before).abs().max() > 1e-3
    torch.testing.assert_close(drawn(merged(network)), changed)
    assert merged(network).state_dict().keys() == plain.state_dict().keys()
    monkeypatch.setattr(Workers, "sharded", True)
    with pytest.raises(ValueError, match="leave out --shard"):
        trainable(tiny_model(), dataclasses.replace(TUNE, train="low-rank"), Workers())


def test_tuning_computes_contexts_in_bf16_and_the_rest_in_float32():
    model, dtypes, gradients = tiny_model().requires_grad_(True), {}, {}

    def watch(name):
        return lambda module, inputs, output: dtypes.setdefault(name, set()).add(output.dtype)

    model.decoder_blocks[0].mlp.register_forward_hook(watch("transformer"))
    model.head.final_layer.register_forward_hook(watch("head"))
    for autocast in (False, True):
        dtypes.clear()
        how = {"iterations": 4, "seeds": [1, 2], "gradient_iterations": 2, "autocast": autocast}
        tokens = sample(model, DrawInOneStep(), model.embed(torch.tensor([0, 1])), **how)
        assert tokens.dtype == torch.float32
        tokens.square().sum().backward()
        assert dtypes["transformer"] == {torch.bfloat16 if autocast else torch.float32}
        assert dtypes["head"] == {torch.float32}
        gradients[autocast] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
    assert gradients[True].keys() == gradients[False].keys()
    for name, exact in gradients[False].items():
        if exact.abs().max() > 1e-3 and not name.endswith("qkv.bias"):
            similarity = torch.cosine_similarity(exact.flatten(), gradients[True][name].flatten(), dim=0)
            assert similarity > 0.98, name  # none of them vanishes, though two iterations ran without gradients before
