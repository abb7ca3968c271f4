"""Differentiable rewards: `reward(images in [0, 1], prompts) -> one number per image`.

A prompt is a text; one that was made for a class (a `Prompt`) knows it as `prompt.class_name`.
"""

from marval.rewards.base import (
    KNOWN,
    Reward,
    WeightedReward,
    checked,
    find_reward,
    parse_rewards,
    parts_of,
    reward_hash,
    reward_identity,
)
from marval.rewards.classifier import Classifier, ClassifierReward, classifier_file, load_classifier
from marval.rewards.frechet import FrechetReward
from marval.rewards.prompts import Prompt, label_prompts, prompts_of

__all__ = [
    "KNOWN",
    "Classifier",
    "ClassifierReward",
    "FrechetReward",
    "Prompt",
    "Reward",
    "WeightedReward",
    "checked",
    "classifier_file",
    "find_reward",
    "label_prompts",
    "load_classifier",
    "parse_rewards",
    "parts_of",
    "prompts_of",
    "reward_hash",
    "reward_identity",
]
