"""Prompts that know the class that they ask for, and what is computed of prompts, once each."""

from collections.abc import Callable, Sequence
from itertools import product

import torch
from jaxtyping import Shaped
from torch import Tensor

from marval.classes import label_names
from marval.config import ModelConfig


class Prompt(str):
    """A text, and the class (and style) that it asks for: a reward may read each. A plain text asks for no class."""

    class_name: str = ""
    style: str = ""

    @classmethod
    def of(cls, template: str, class_name: str) -> "Prompt":
        """The prompt of a class: `template` with the class's name in the place of {}; other braces are refused."""
        if "{" in template.replace("{}", ""):
            raise ValueError(f"prompt {template!r}: expected {{}} where the class's name goes, and no other braces")
        prompt = cls(template.replace("{}", class_name))
        prompt.class_name = class_name
        return prompt


def prompts_of(template: str, class_names: Sequence[str], labels: Sequence[int]) -> list[Prompt]:
    """A prompt for each label, as `Prompt.of` makes it."""
    return [Prompt.of(template, class_names[label]) for label in labels]


def label_prompts(template: str, config: ModelConfig) -> list[Prompt]:
    """The prompt of every label: of a class as `Prompt.of` makes it; of a model of text the known prompt itself."""
    if not config.encoder:
        return prompts_of(template, config.class_names, range(len(config.class_names)))
    prompts = [Prompt(name) for name in label_names(config)]
    for prompt, (name, style) in zip(prompts, product(config.class_names, config.styles or ("",)), strict=True):
        prompt.class_name, prompt.style = name, style
    return prompts


class Prompts:
    """Remembers `of(prompt)`, a tensor, for every prompt that it was asked about."""

    def __init__(self, of: Callable[[str], Tensor]):
        self.of = of
        self.known: dict[str, Tensor] = {}

    def __call__(self, prompts: Sequence[str]) -> Shaped[Tensor, "b *rest"]:
        """The tensors of `prompts`, stacked."""
        # Not in inference mode, whatever the caller is in: what is remembered may later be part of a gradient.
        with torch.inference_mode(False), torch.no_grad():
            self.known |= {prompt: self.of(prompt) for prompt in dict.fromkeys(prompts) if prompt not in self.known}
        return torch.stack([self.known[prompt] for prompt in prompts])
