"""`image-reward`: ImageReward (Xu et al. 2023), from its own file: BLIP's encoders and a head on the fused [CLS]."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from marval.rewards import weights
from marval.rewards.clip import ScoreHead
from marval.rewards.preprocess import Preprocessing

BERT = "google-bert/bert-base-uncased"
LENGTH = 35  # tokens of a prompt
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw score, so that rewards have mean 0 and deviation 1
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")

# BLIP's large image encoder and its text encoder, as transformers configures them.
VISION: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "encoder_hidden_size": 1024, "max_position_embeddings": 512, "vocab_size": 30524, "hidden_act": "gelu",
    "layer_norm_eps": 1e-12, "is_decoder": True,  # which gives it attention to the image
}  # fmt: skip

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
    """An image's score for its prompt: mean 0 and standard deviation 1 on its authors' data."""

    def __init__(self) -> None:
        super().__init__()
        library = weights.transformers()
        self.vision = library.BlipVisionModel(library.BlipVisionConfig(**VISION))
        self.text = library.BlipTextModel(library.BlipTextConfig(**TEXT), add_pooling_layer=False)
        self.head = ScoreHead(TEXT["hidden_size"])
        self.tokenizer: Any = None
        self.preprocessing = Preprocessing(VISION["image_size"], round_half_even=True)

    def forward(self, images: Float[Tensor, "b c h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """The text encoder attends to the image; the head reads its first token."""
        how = {"padding": "max_length", "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
        words = self.tokenizer([str(prompt) for prompt in prompts], **how).to(images.device)
        image = self.vision(self.preprocessing(images)).last_hidden_state
        fused = self.text(
            input_ids=words.input_ids, attention_mask=words.attention_mask, encoder_hidden_states=image,
            encoder_attention_mask=torch.ones(image.shape[:2], dtype=torch.long, device=image.device),
        ).last_hidden_state  # fmt: skip
        return (self.head(fused[:, 0]) - MEAN) / STD


def load_image_reward(source: str, device: torch.device | str = "cpu") -> ImageReward:
    """Load ImageReward v1.0 from a folder with the checkpoint and BERT's tokenizer, or the checkpoint's hub id."""
    folder = weights.find_folder(source, "ImageReward.pt")
    file, tensors = weights.read_weights(folder, "*.pt")
    needed = weights.renamed({name: t for name, t in tensors.items() if not name.startswith(UNUSED)}, RENAMED)
    reward = weights.load_strict(ImageReward, needed, file).to(device)
    words = folder if Path(source).is_dir() else weights.find_folder(BERT, *weights.TOKENIZER)
    reward.tokenizer = weights.from_folder("BertTokenizer", words)
    return reward
