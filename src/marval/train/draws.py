"""The random draws of a training step. They are made for the whole batch, on the CPU; every process takes its rows."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from marval.presets import DistillConfig, TrainConfig


def masked_count(num_tokens: int, ratio_min: float, ratio_std: float, rng: torch.Generator) -> int:
    """How many tokens to mask: the ratio is a normal around 1, cut to [ratio_min, 1] (MAR: 0.7 and std 0.25)."""
    low, high = torch.special.ndtr(torch.tensor([(ratio_min - 1) / ratio_std, 0.0], dtype=torch.float64))
    u = low + (high - low) * torch.rand((), generator=rng, dtype=torch.float64)
    ratio = 1 + ratio_std * torch.special.ndtri(u).clamp(max=0.0)
    return min(num_tokens, max(1, int(torch.ceil(num_tokens * ratio))))


def split_tokens(
    batch: int, num_tokens: int, masked: int, targets: int, rng: torch.Generator
) -> tuple[Int[Tensor, "b v"], Int[Tensor, "b q"]]:
    """A random order per image: its visible positions, and `targets` (at most) of its `masked` hidden ones."""
    order = torch.rand(batch, num_tokens, generator=rng).argsort(dim=1)
    visible = num_tokens - masked
    return order[:, :visible], order[:, visible : visible + min(targets, masked)]


def hidden_positions(
    num_tokens: int, settings: TrainConfig | DistillConfig, rng: torch.Generator
) -> tuple[Int[Tensor, "b v"], Int[Tensor, "b q"]]:
    """Visible positions and target positions of every image of a batch; one mask ratio for all."""
    masked = masked_count(num_tokens, settings.mask_ratio_min, settings.mask_ratio_std, rng)
    return split_tokens(settings.batch_size, num_tokens, masked, settings.tokens_per_image, rng)


def noise_levels(
    shape: tuple[int, ...], low: int, high: int, rng: torch.Generator
) -> tuple[Int[Tensor, "b q"], Float[Tensor, "b q c"]]:
    """A level in [low, high] and Gaussian noise for each target token; `shape` is (images, targets, channels)."""
    t = torch.randint(low, high + 1, shape[:2], generator=rng)
    return t, torch.randn(shape, generator=rng)
