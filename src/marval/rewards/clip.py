"""Rewards on CLIP's encoders: `clip`, `pickscore` and `aesthetic`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from marval.rewards import weights
from marval.rewards.preprocess import Preprocessing
from marval.rewards.prompts import Prompts


class ClipReward:
    """`scale` times the cosine between an image's and its prompt's embeddings."""

    def __init__(self, model: Any, tokenizer: Any, preprocessing: Preprocessing, scale: float):
        self.model, self.tokenizer, self.preprocessing, self.scale = model, tokenizer, preprocessing, scale
        self.text = Prompts(self.text_embedding)

    def __call__(self, images: Float[Tensor, "b c h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        return self.scale * (image_embeddings(self.model, self.preprocessing(images)) * self.text(prompts)).sum(dim=1)

    def text_embedding(self, prompt: str) -> Float[Tensor, " d"]:
        """A prompt's embedding, of length 1; what is beyond CLIP's 77 tokens is cut off."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompt, truncation=True, max_length=length, return_tensors="pt").input_ids
        pooled = self.model.text_model(tokens.to(self.model.logit_scale.device)).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=1)[0]


def image_embeddings(model: Any, pixels: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b d"]:
    """CLIP's embeddings of preprocessed images, of length 1."""
    return F.normalize(model.visual_projection(model.vision_model(pixels).pooler_output), dim=1)


def load_images_of(folder: Path, device: torch.device | str) -> tuple[Any, Preprocessing]:
    """Load a CLIP, and how it wants its images: resized to its own size, with the mean and deviation of its folder."""
    model = weights.load_clip(folder).to(device)
    try:
        about = json.loads((folder / "preprocessor_config.json").read_text())
        mean, std = about["image_mean"], about["image_std"]
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}/preprocessor_config.json is missing, or not of a CLIP ({error})") from None
    return model, Preprocessing(model.config.vision_config.image_size, mean=mean, std=std)


def load_clip(source: str, device: torch.device | str = "cpu") -> ClipReward:
    """Load `clip`: 100 times the cosine of any CLIP (Radford et al. 2021), by its folder or hub id.

    Hessel et al. 2021 cut the CLIP score off at 0, where it would have no gradient; here it is not.
    """
    folder = weights.find_folder(source, *weights.MODEL, *weights.TOKENIZER)
    model, preprocessing = load_images_of(folder, device)
    return ClipReward(model, weights.from_folder("CLIPTokenizer", folder), preprocessing, scale=100.0)


def load_pickscore(source: str, device: torch.device | str = "cpu") -> ClipReward:
    """Load `pickscore` (Kirstain et al. 2023): the cosine times its model's own scale."""
    reward = load_clip(source, device)
    reward.scale = float(reward.model.logit_scale.exp())
    return reward


class ScoreHead(nn.Module):
    """Five linear layers with nothing but (untrained) dropout between them; ImageReward has the same."""

    def __init__(self, inputs: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(inputs, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2),
            nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
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
    """Load LAION's improved aesthetic predictor (Schuhmann 2022): a linear head on CLIP ViT-L/14's embeddings.

    Args:
        source: a folder with CLIP ViT-L/14 in transformers' form and the head's .pth beside it, or the head's hub id.
    """
    folder = weights.find_folder(source, "aesthetic-model.pth")
    file, tensors = weights.read_weights(folder, "*.pth")
    clip = folder if Path(source).is_dir() else weights.find_folder(weights.CLIP, *weights.MODEL)
    model, preprocessing = load_images_of(clip, device)
    head = weights.load_strict(lambda: ScoreHead(model.config.projection_dim), tensors, file).to(device)
    return AestheticReward(model, head, preprocessing)
