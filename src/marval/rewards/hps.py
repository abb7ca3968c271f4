"""`hps-v2`: Human Preference Score v2 and v2.1 (Wu et al. 2023), from its own file: a CLIP ViT-H/14 of open_clip."""

import re
from typing import Any

import torch

from marval.rewards import weights
from marval.rewards.clip import ClipReward
from marval.rewards.preprocess import Preprocessing

WEIGHTS = weights.Part((("HPS_v2.1_compressed.pt", "*.pt"),))
HEADS_OF_WIDTH = {1280: 16}  # ViT-H's image tower; elsewhere a head has 64 channels

# open_clip's names, and those of transformers' CLIPModel.
RENAMED = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
)
TRANSPOSED = ("visual_projection.weight", "text_projection.weight")  # open_clip multiplies by these from the right


def clip_tensors(tensors: weights.Tensors) -> weights.Tensors:
    """Give open_clip's weights the names of transformers' CLIPModel; queries, keys and values come apart."""
    split: weights.Tensors = {}
    for name, tensor in weights.renamed(tensors, RENAMED).items():
        if match := re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", name):
            parts = zip("qkv", tensor.chunk(3), strict=True)
            split |= {f"{match[1]}.self_attn.{part}_proj.{match[2]}": piece for part, piece in parts}
        else:
            split[name] = tensor.T if name in TRANSPOSED else tensor
    return split


def clip_config(tensors: weights.Tensors) -> Any:
    """Read the sizes of a CLIP off open_clip's weights."""

    def tower(prefix: str, width: int) -> dict[str, Any]:
        return {
            "hidden_size": width, "intermediate_size": len(tensors[f"{prefix}0.mlp.c_fc.weight"]),
            "num_hidden_layers": weights.depth(tensors, prefix), "hidden_act": "gelu",
            "num_attention_heads": HEADS_OF_WIDTH.get(width, max(1, width // 64)),
        }  # fmt: skip

    width, _, patch, _ = tensors["visual.conv1.weight"].shape
    side = round((len(tensors["visual.positional_embedding"]) - 1) ** 0.5) * patch
    vision = {**tower("visual.transformer.resblocks.", width), "image_size": side, "patch_size": patch}
    length, text_width = tensors["positional_embedding"].shape
    text = {
        **tower("transformer.resblocks.", text_width), "max_position_embeddings": length,
        "vocab_size": len(tensors["token_embedding.weight"]),
        "eos_token_id": 2,  # makes CLIPModel read the embedding at the highest token, as open_clip does
    }  # fmt: skip
    projection = tensors["text_projection"].shape[1]
    return weights.transformers("hps-v2").CLIPConfig(vision_config=vision, text_config=text, projection_dim=projection)


def load_hps(name: str, source: str, device: torch.device | str = "cpu") -> ClipReward:
    """Load HPSv2: the cosine of its CLIP (about 0.27; its tables show 100 times that); images are padded to a square.

    Args:
        source: a folder with the checkpoint and CLIP's tokenizer, or the checkpoint's hub id.
    """
    folder, words = weights.find_parts(name, source, WEIGHTS, weights.CLIP_WORDS)  # open_clip's words are OpenAI's
    file, tensors = weights.read_weights(name, folder, "*.pt")
    build = weights.transformers(name).CLIPModel
    model = weights.load_strict(lambda: build(clip_config(tensors)), clip_tensors(tensors), file).to(device)
    side = model.config.vision_config.image_size
    return ClipReward(model, weights.load_tokenizer(name, words), Preprocessing(side, side, "pad"), scale=1.0)
