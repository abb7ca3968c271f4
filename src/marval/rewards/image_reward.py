"""`image-reward`: ImageReward (Xu et al. 2023), from its own file: BLIP's encoders and a head on the fused [CLS]."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from marval.rewards.aesthetic import ScoreHead
from marval.rewards.preprocess import Preprocessing
from marval.rewards.prompts import Prompts
from marval.rewards.weights import (
    depth,
    find_checkpoint,
    load_strict,
    load_tokenizer,
    read_weights,
    renamed,
    shape_reader,
    transformers_class,
)

WEIGHTS = "ImageReward.pt"
TOKENIZER_SOURCE = "google-bert/bert-base-uncased"
LENGTH = 35  # tokens of a prompt
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw score, so that rewards have mean 0 and deviation 1
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")

# The names of BLIP's own code (timm's in the image encoder), and those of transformers' BLIP.
RENAMED = (
    (r"^blip\.text_encoder\.", "text."),
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (r"^mlp\.layers\.", "head.layers."),
)


class ImageReward(nn.Module):
    """The network: image encoder, text encoder that attends to the image, and the head on its first token."""

    def __init__(self, vision_config: Any, text_config: Any):
        super().__init__()
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        self.vision = transformers_class("image-reward", "BlipVisionModel")(vision_config)
        self.text = BlipTextModel(text_config, add_pooling_layer=False)
        self.head = ScoreHead(text_config.hidden_size)

    def forward(
        self, pixels: Float[Tensor, "b 3 s s"], tokens: Int[Tensor, "b n"], mask: Int[Tensor, "b n"]
    ) -> Float[Tensor, " b"]:
        """The normalised score."""
        image = self.vision(pixels).last_hidden_state
        seen = torch.ones(image.shape[:2], dtype=torch.long, device=image.device)
        fused = self.text(
            input_ids=tokens, attention_mask=mask, encoder_hidden_states=image, encoder_attention_mask=seen
        ).last_hidden_state
        return (self.head(fused[:, 0]) - MEAN) / STD


class ImageRewardScore:
    """ImageReward's score of an image for its prompt: mean 0 and standard deviation 1 on its authors' data."""

    def __init__(self, network: ImageReward, tokenizer: Any, preprocessing: Preprocessing):
        self.network, self.tokenizer, self.preprocessing = network, tokenizer, preprocessing
        # The text encoder attends to the image, so that nothing but the tokens is the same for all images.
        self.text = Prompts(self.tokens)

    def __call__(self, images: Float[Tensor, "b c h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        tokens, mask = self.text(prompts).to(images.device).unbind(dim=1)
        return self.network(self.preprocessing(images), tokens, mask)

    def tokens(self, prompt: str) -> Int[Tensor, "2 n"]:
        """A prompt's tokens, cut off or filled up to 35, and which of them are the prompt's."""
        found = self.tokenizer(prompt, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        return torch.stack([found.input_ids[0], found.attention_mask[0]])


def blip_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """ImageReward's weights under the names of `ImageReward`, without the projections that it never calls."""
    return {renamed(name, RENAMED): tensor for name, tensor in tensors.items() if not name.startswith(UNUSED)}


def blip_configs(tensors: dict[str, Tensor], file: Path) -> tuple[Any, Any]:
    """The sizes of the image and the text encoder; a head has 64 channels in both.

    Raises:
        ValueError: a tensor that the sizes are read off is missing.
    """
    shape = shape_reader(tensors, file, f"ImageReward's checkpoint ({WEIGHTS})")

    width, _, patch, _ = shape("blip.visual_encoder.patch_embed.proj.weight")
    side = round((shape("blip.visual_encoder.pos_embed")[1] - 1) ** 0.5) * patch
    vision = transformers_class("image-reward", "BlipVisionConfig")(
        hidden_size=width, image_size=side, patch_size=patch,
        intermediate_size=shape("blip.visual_encoder.blocks.0.mlp.fc1.weight")[0],
        num_hidden_layers=depth(tensors, "blip.visual_encoder.blocks."), num_attention_heads=max(1, width // 64),
        hidden_act="gelu", layer_norm_eps=1e-6,
    )  # fmt: skip
    words, text_width = shape("blip.text_encoder.embeddings.word_embeddings.weight")
    text = transformers_class("image-reward", "BlipTextConfig")(
        vocab_size=words, hidden_size=text_width, encoder_hidden_size=width,
        intermediate_size=shape("blip.text_encoder.encoder.layer.0.intermediate.dense.weight")[0],
        num_hidden_layers=depth(tensors, "blip.text_encoder.encoder.layer."),
        num_attention_heads=max(1, text_width // 64),
        max_position_embeddings=shape("blip.text_encoder.embeddings.position_embeddings.weight")[0],
        hidden_act="gelu", layer_norm_eps=1e-12, is_decoder=True,  # which gives it attention to the image
    )  # fmt: skip
    return vision, text


def load_image_reward(source: str, device: torch.device | str = "cpu") -> ImageRewardScore:
    """ImageReward v1.0.

    Args:
        source: a folder with the checkpoint and BERT's tokenizer, or the checkpoint's hub id.

    Raises:
        ValueError: files that are missing, damaged or of another model, or transformers is not installed.
    """
    file, words = find_checkpoint("image-reward", source, WEIGHTS, TOKENIZER_SOURCE)
    tensors = read_weights(file)
    vision, text = blip_configs(tensors, file)
    with torch.device("meta"):
        network = ImageReward(vision, text)
    load_strict(network, blip_tensors(tensors), file)
    network = network.to(device).eval().requires_grad_(False)
    preprocessing = Preprocessing(vision.image_size, vision.image_size, round_half_even=True)
    return ImageRewardScore(network, load_tokenizer("image-reward", words, "BertTokenizer"), preprocessing)
