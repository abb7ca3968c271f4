"""Rewards by CLIP's dual encoder: `clip` (Radford et al. 2021) and `pickscore` (Kirstain et al. 2023)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from marval.rewards.preprocess import Preprocessing
from marval.rewards.prompts import Prompts
from marval.rewards.weights import CLIP_FILES, find_folder, load_clip, load_tokenizer


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


def load_clip_reward(source: str, device: torch.device | str = "cpu") -> ClipReward:
    """CLIP score: 100 times the cosine (Hessel et al. 2021; not cut off at 0, where it would have no gradient).

    Args:
        source: a folder in transformers' form, or a hub id, of any CLIP.

    Raises:
        ValueError: files that are missing or damaged, or transformers is not installed.
    """
    folder = find_folder("clip", source, CLIP_FILES)
    preprocessing = Preprocessing.read(folder / "preprocessor_config.json")
    model = load_clip("clip", folder).to(device)
    return ClipReward(model, load_tokenizer("clip", folder), preprocessing, scale=100.0)


def load_pickscore(source: str, device: torch.device | str = "cpu") -> ClipReward:
    """PickScore: the cosine times the model's own scale; the paper's reward (about 20).

    Raises:
        ValueError: as `load_clip_reward`.
    """
    folder = find_folder("pickscore", source, CLIP_FILES)
    preprocessing = Preprocessing.read(folder / "preprocessor_config.json")
    model = load_clip("pickscore", folder).to(device)
    return ClipReward(model, load_tokenizer("pickscore", folder), preprocessing, float(model.logit_scale.exp()))
