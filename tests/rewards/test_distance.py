"""The reward `fd:SPACE`: its averages, what it asks for, and the feature spaces that it has."""

import pytest
import torch

from marval.evaluate.features import PixelFeatures, find_features
from marval.rewards import FrechetReward, parse_rewards, reward_hash
from marval.rewards import frechet as frechet_module
from marval.rewards.classifier import Classifier, save_classifier
from marval.rewards.frechet import RealMoments
from marval.runtime.distributed import Workers
from marval.runtime.rng import generator
from tiny import tiny_data
from training import distance_reward


def images(seed, count=6):
    return torch.rand(count, 1, 8, 8, generator=generator("images", seed))


def test_the_averages_forget_slowly_and_have_no_bias_from_their_start(monkeypatch):
    monkeypatch.setattr(frechet_module, "DIRECTIONS", 40)
    reward, batches = distance_reward(decay=0.75), [images(seed) for seed in range(4)]
    for batch in batches:
        reward.observe([batch[:2], batch[2:4]], Workers(), starting=True, others=[batch[4:]])
    shares = torch.tensor([0.75**age for age in (3, 2, 1, 0)], dtype=torch.float64)
    shares = (shares / shares.sum()).repeat_interleave(6) / 6
    y = reward.along_axes(torch.cat(batches))
    mean = shares @ y
    covariance = (y * shares[:, None]).mT @ y - mean[:, None] * mean
    drawn = reward.moments.now()
    torch.testing.assert_close(drawn.mean, mean)
    torch.testing.assert_close(drawn.covariance, covariance[:40, :40])
    torch.testing.assert_close(drawn.others, covariance.diagonal()[40:])


def test_one_batch_of_the_real_images_has_no_distance_and_its_gradient_points_home():
    real = tiny_data().images.float() / 255
    reward, dim = distance_reward(decay=0.0), (0.7 * real + 0.2).requires_grad_(True)
    far = reward.observe([dim], Workers(), starting=True)
    value = reward(dim, [""] * len(dim))
    assert value.mean().item() == pytest.approx(-1.0)  # over that of the start
    value.mean().backward()
    closer = (dim + 20 * dim.grad).detach()
    assert reward.observe([closer], Workers(), starting=False) < 0.9 * far
    assert reward.observe([real], Workers(), starting=False) < 1e-3 * far


def test_other_images_count_and_get_no_gradient():
    reward, some, others = distance_reward(), images(0).requires_grad_(True), images(1).requires_grad_(True)
    reward.observe([some], Workers(), starting=True, others=[others])
    reward(some, [""] * 6).mean().backward()
    assert some.grad is not None
    assert others.grad is None


def test_images_of_another_turn_have_a_distance_and_averages_of_their_own():
    both, alone = distance_reward(turns=2), distance_reward()
    for seed in range(2):
        apart = alone.observe([images(seed)], Workers(), starting=seed == 0)
        both.observe([0.5 * images(seed)], Workers(), starting=seed == 0, turn=0)
        assert both.observe([images(seed)], Workers(), starting=False, turn=1) == pytest.approx(apart)
    seen = images(1)
    both.seen, alone.seen = ([(seen, reward.along_axes(seen))] for reward in (both, alone))
    torch.testing.assert_close(both(seen, [""] * 6), alone(seen, [""] * 6))  # over the start of its own turn


def test_a_batch_that_it_has_not_seen_and_features_that_are_not_finite_are_refused():
    reward, some = distance_reward(), images(0)
    with pytest.raises(ValueError, match="fd:pixels: it is of a whole batch"):
        reward(some, [""] * 6)
    some[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="fd:pixels: some features of the drawn images are not finite"):
        reward.observe([some], Workers(), starting=True)


def test_what_a_resumed_run_compares_is_features_and_data():
    first, second = distance_reward(), distance_reward()
    second.observe([images(0)], Workers(), starting=True)
    assert reward_hash(first) == reward_hash(second)
    other = FrechetReward("pixels", PixelFeatures(), RealMoments.of(torch.zeros(2), torch.eye(2)), 0.9, "other data")
    assert reward_hash(first) != reward_hash(other)
    with pytest.raises(ValueError, match=r"--reward fd:pixels: .*tune --reward alone takes"):
        parse_rewards("fd:pixels")


@pytest.mark.parametrize("name", ["efficientnet", "pixels", "classifier", "classifier:mine", "features.py:rows"])
def test_every_space_has_the_same_features_for_bytes_and_with_a_gradient(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_classifier(tmp_path / "mine", Classifier("residual", 1, ("a", "b")), {})
    (tmp_path / "features.py").write_text("def rows(images): return images.float().flatten(1)[:, ::7] / 255")
    network, some = find_features(name), (255 * torch.rand(3, 1, 28, 28, generator=generator(0))).byte()
    values = some.float().requires_grad_(True)
    features = network.of_values(values)
    torch.testing.assert_close(network(some), features.detach())
    assert features.ndim == 2
    features.square().sum().backward()
    assert values.grad.any()
    assert find_features(name).name == network.name


def test_a_classifier_of_other_channels_is_refused():
    with pytest.raises(ValueError, match="for 1 channels, the images have 3"):
        find_features("classifier")(torch.zeros(1, 3, 28, 28, dtype=torch.uint8))
