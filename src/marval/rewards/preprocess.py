"""From images in [0, 1] to a reward network's input: differentiable, and the same for all rewards."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocessing:
    """Antialiased bicubic resize to `side`, centre crop (or padding) and normalisation, as PIL-based processors do.

    Fit "crop": the middle of the longer side stays (CLIP, ImageReward). "pad": black fills the shorter one (HPSv2).

    Within 2/255 of the processors. Pillow 13 resizes the columns of tall pictures (from 1:1.5 on) before the rows, and
    clips between the two: there a few pixels beside hard edges differ by up to 6/255.
    """

    side: int = 224
    fit: Literal["crop", "pad"] = "crop"
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD
    round_half_even: bool = False  # where the crop begins when a half pixel is over: torchvision's way, not PIL's

    def __call__(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 s s"]:
        """Images in [0, 1] (1 or 3 channels) to the network's input.

        Bicubic weights overshoot at edges: the values are clipped as bytes are, but the gradient passes as if they were
        not, so that no pixel of the crop is without one.
        """
        height, width = images.shape[2:]
        x = images.expand(-1, 3, -1, -1)
        if self.fit == "crop":
            longer = int(self.side * max(height, width) / min(height, width))
            rows, columns = (self.side, longer) if height <= width else (longer, self.side)
        else:
            rows, columns = (round(n * (self.side / max(height, width))) for n in (height, width))
        for size in ((height, columns), (rows, columns)):  # PIL's two passes; each one clips
            x = F.interpolate(x, size, mode="bicubic", antialias=True)
            x = x + (x.clamp(0, 1) - x).detach()
        if self.fit == "crop":
            half = round if self.round_half_even else math.floor
            top, left = (half((n - self.side) / 2) for n in (rows, columns))
            x = x[:, :, top : top + self.side, left : left + self.side]
        else:
            top, left = ((self.side - n) // 2 for n in (rows, columns))
            x = F.pad(x, (left, self.side - columns - left, top, self.side - rows - top))
        mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device)[:, None, None] for v in (self.mean, self.std))
        return (x - mean) / std
