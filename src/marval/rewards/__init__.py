"""Differentiable rewards: `reward(images in [0, 1], prompts) -> one number per image`."""

from marval.rewards.base import (
    KNOWN,
    Reward,
    WeightedReward,
    checked,
    find_reward,
    parse_rewards,
    reward_hash,
    reward_identity,
    standardized,
)
from marval.rewards.classifier import Classifier, ClassifierReward, classifier_file, load_classifier

__all__ = [
    "KNOWN",
    "Classifier",
    "ClassifierReward",
    "Reward",
    "WeightedReward",
    "checked",
    "classifier_file",
    "find_reward",
    "load_classifier",
    "parse_rewards",
    "reward_hash",
    "reward_identity",
    "standardized",
]
