"""From images in [0, 1] to a reward network's input: differentiable, and the same for all rewards."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocessing:
    """Antialiased bicubic resize, centre crop (or padding) and normalisation, as PIL-based processors do them.

    Fit "crop": the shorter side becomes `resize` and the middle `side` x `side` stays (CLIP, ImageReward). "pad": the
    longer side becomes `side` and black fills the rest (HPSv2).

    Within 2/255 of the processors. Pillow 13 resizes the columns of tall pictures (from 1:1.5 on) before the rows, and
    clips between the two: there a few pixels beside hard edges differ by up to 6/255.
    """

    side: int = 224
    resize: int = 224
    fit: Literal["crop", "pad"] = "crop"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    round_half_even: bool = False  # where the crop begins when a half pixel is over: torchvision's way, not PIL's

    def __call__(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 s s"]:
        """Images in [0, 1] (1 or 3 channels) to the network's input.

        Bicubic weights overshoot at edges: the values are clipped as bytes are, but the gradient passes as if they were
        not, so that no pixel of the crop is without one.

        Raises:
            ValueError: neither 1 nor 3 channels.
        """
        if images.shape[1] not in (1, 3):
            raise ValueError(f"images of {images.shape[1]} channels: expected 1 (grey) or 3 (RGB)")
        x = images.expand(-1, 3, -1, -1)
        rows, columns = self.resized(images.shape[2], images.shape[3])
        for size in ((images.shape[2], columns), (rows, columns)):  # PIL's two passes; each one clips
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

    def resized(self, rows: int, columns: int) -> tuple[int, int]:
        """The size that an image is resized to, before the crop or the padding."""
        if self.fit == "pad":
            scale = self.side / max(rows, columns)
            return round(rows * scale), round(columns * scale)
        longer = int(self.resize * max(rows, columns) / min(rows, columns))
        return (self.resize, longer) if rows <= columns else (longer, self.resize)

    @classmethod
    def read(cls, file: Path) -> "Preprocessing":
        """Read a `preprocessor_config.json` of CLIP's processor.

        Raises:
            ValueError: not such a file, or a kind of processing that is not CLIP's.
        """
        try:
            about = json.loads(file.read_text())
            size, crop = about.get("size", 224), about.get("crop_size", 224)
            resize = size["shortest_edge"] if isinstance(size, dict) else int(size)
            side = crop["height"] if isinstance(crop, dict) else int(crop)
            mean, std = tuple(about.get("image_mean", CLIP_MEAN)), tuple(about.get("image_std", CLIP_STD))
        except (OSError, LookupError, TypeError, AttributeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"{file} is no configuration of CLIP's processor ({what})") from None
        if about.get("resample", 3) != 3 or side > resize or not about.get("do_center_crop", True):
            raise ValueError(
                f"{file}: size {size}, crop {crop}, resampling {about.get('resample')}: expected 3 (bicubic), and a "
                "centre crop no larger than the image"
            )
        return cls(side, resize, "crop", mean, std)
