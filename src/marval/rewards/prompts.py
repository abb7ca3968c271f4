"""What is computed of prompts, once each."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor


class Prompts:
    """Remembers `of(prompt)`, a tensor, for every prompt that it was asked about."""

    def __init__(self, of: Callable[[str], Tensor]):
        self.of = of
        self.known: dict[str, Tensor] = {}

    def __call__(self, prompts: Sequence[str]) -> Shaped[Tensor, "b *rest"]:
        """The tensors of `prompts`, stacked."""
        # Not in inference mode, whatever the caller is in: what is remembered may later be part of a gradient.
        with torch.inference_mode(False), torch.no_grad():
            for prompt in dict.fromkeys(prompts):
                if prompt not in self.known:
                    self.known[prompt] = self.of(prompt)
        return torch.stack([self.known[prompt] for prompt in prompts])
