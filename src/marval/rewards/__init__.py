"""Differentiable rewards: `reward(images in [0, 1], prompts) -> one number per image`."""

from marval.rewards.base import KNOWN, Reward, checked, find_reward, parse_rewards, standardized, weighted_reward
from marval.rewards.classifier import Classifier, ClassifierReward, load_classifier

__all__ = [
    "KNOWN",
    "Classifier",
    "ClassifierReward",
    "Reward",
    "checked",
    "find_reward",
    "load_classifier",
    "parse_rewards",
    "standardized",
    "weighted_reward",
]
