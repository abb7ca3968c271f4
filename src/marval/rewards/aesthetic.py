"""`aesthetic`: LAION's improved aesthetic predictor (Schuhmann 2022), a linear head on CLIP ViT-L/14's embeddings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from marval.rewards.clip import image_embeddings
from marval.rewards.preprocess import Preprocessing
from marval.rewards.weights import CLIP_FILES, find_folder, load_clip, load_strict, only_file, read_weights

CLIP_SOURCE = "openai/clip-vit-large-patch14"
WEIGHTS = "aesthetic-model.pth"  # as the hub has it; elsewhere sac+logos+ava1-l14-linearMSE.pth
WIDTHS = (1024, 128, 64, 16)


class ScoreHead(nn.Module):
    """Five linear layers with nothing but (untrained) dropout between them; ImageReward has the same."""

    def __init__(self, inputs: int):
        super().__init__()
        first, second, third, fourth = WIDTHS
        self.layers = nn.Sequential(
            nn.Linear(inputs, first), nn.Dropout(0.2), nn.Linear(first, second), nn.Dropout(0.2),
            nn.Linear(second, third), nn.Dropout(0.1), nn.Linear(third, fourth), nn.Linear(fourth, 1),
        )  # fmt: skip

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
        return self.layers(x)[:, 0]


class AestheticReward:
    """The score (about 1 to 10) that people would give the picture; the prompt does not matter."""

    def __init__(self, model: Any, head: ScoreHead, preprocessing: Preprocessing):
        self.model, self.head, self.preprocessing = model, head, preprocessing

    def __call__(self, images: Float[Tensor, "b c h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        return self.head(image_embeddings(self.model, self.preprocessing(images)))


def load_aesthetic(source: str, device: torch.device | str = "cpu") -> AestheticReward:
    """The aesthetic predictor.

    Args:
        source: a folder with CLIP ViT-L/14 in transformers' form and the head's .pth beside it, or the head's hub id.

    Raises:
        ValueError: files that are missing, damaged or of another model, or transformers is not installed.
    """
    image_files = [entry for entry in CLIP_FILES if "tokenizer.json" not in entry]
    if Path(source).is_dir():
        folder = clip = find_folder("aesthetic", source, [("*.pth",), *image_files])
    else:
        folder = find_folder("aesthetic", source, [(WEIGHTS,)], optional=(), others=f"{CLIP_SOURCE}'s files")
        clip = find_folder("aesthetic", CLIP_SOURCE, image_files)
    file = only_file("aesthetic", folder, ["*.pth"])
    model = load_clip("aesthetic", clip).to(device)
    with torch.device("meta"):
        head = ScoreHead(model.config.projection_dim)
    load_strict(head, read_weights(file), file)
    head = head.to(device).eval().requires_grad_(False)
    return AestheticReward(model, head, Preprocessing.read(clip / "preprocessor_config.json"))
