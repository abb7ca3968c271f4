"""`text-image`: how well a picture fits a sentence, offline. It is no CLIP score, and compares with none.

Image features of EfficientNet-Lite0 and sentence embeddings of all-MiniLM-L6-v2, both frozen and packaged, meet by one
linear layer each. Only these two layers were trained (`tools/text_image.py`), on the phrases of one data set.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from marval.io.text import load_encoder
from marval.presets import ENCODER
from marval.rewards.efficientnet import FEATURES, EfficientNetFeatures
from marval.rewards.prompts import Prompts
from marval.rewards.weights import described_file, load_described

TEXT_WIDTH = 384
SENTENCES = "all-MiniLM-L6-v2"
MAKER = "tools/text_image.py of the source"


class TextImageHead(nn.Module):
    """A linear layer for (standardised) image features and one for sentence embeddings, into `width` channels."""

    mean: Tensor
    std: Tensor

    def __init__(self, width: int = 64):
        super().__init__()
        self.register_buffer("mean", torch.zeros(EfficientNetFeatures.num_features))
        self.register_buffer("std", torch.ones(EfficientNetFeatures.num_features))
        self.image = nn.Linear(EfficientNetFeatures.num_features, width)
        self.text = nn.Linear(TEXT_WIDTH, width)

    def embed_images(self, features: Float[Tensor, "b f"]) -> Float[Tensor, "b d"]:
        """Image embeddings of length 1."""
        return F.normalize(self.image((features - self.mean) / self.std), dim=1)

    def embed_texts(self, sentences: Float[Tensor, "b t"]) -> Float[Tensor, "b d"]:
        """Text embeddings of length 1."""
        return F.normalize(self.text(sentences), dim=1)


class TextImageReward:
    """The cosine, in [-1, 1], between a picture's and its prompt's embeddings."""

    def __init__(self, network: EfficientNetFeatures, head: TextImageHead, sentence: Callable[[str], Tensor]):
        self.network, self.head = network, head.eval().requires_grad_(False)
        self.text = Prompts(sentence)

    def __call__(self, images: Float[Tensor, "b c h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        features = self.network.of_values(images * 255)
        sentences = self.text(prompts).to(features)
        return (self.head.embed_images(features) * self.head.embed_texts(sentences)).sum(dim=1)


def load_text_image(source: str, device: torch.device | str = "cpu") -> TextImageReward:
    """Load the reward of a head's file, or of a bundled one by name ("fashion-text-image")."""
    file = described_file(source, MAKER)

    def build(about: dict[str, Any]) -> TextImageHead:
        if (about["features"], about["sentences"]) != (FEATURES, SENTENCES):
            raise ValueError(f"{file} is not a text-image head for {FEATURES} and {SENTENCES}: make one with {MAKER}")
        return TextImageHead(about["width"])

    head = load_described(file, build, "text_image", MAKER).to(device)
    encode = load_encoder(ENCODER, device)
    return TextImageReward(EfficientNetFeatures().to(device), head, lambda prompt: encode([prompt])[0])
