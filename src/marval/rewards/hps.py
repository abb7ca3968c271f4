"""`hps-v2`: Human Preference Score v2 and v2.1 (Wu et al. 2023), from its own file: a CLIP ViT-H/14 of open_clip."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marval.rewards.clip import ClipReward
from marval.rewards.preprocess import Preprocessing
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

WEIGHTS = "HPS_v2.1_compressed.pt"
TOKENIZER_SOURCE = "openai/clip-vit-large-patch14"  # all CLIPs of open_clip share OpenAI's vocabulary
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
TRANSPOSED = ("visual.proj", "text_projection")  # open_clip multiplies by these from the right


def clip_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's weights under the names of transformers' CLIPModel."""
    found = {}
    for name, tensor in tensors.items():
        new = renamed(name, RENAMED)
        if match := re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", new):
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                found[f"{match[1]}.self_attn.{part}_proj.{match[2]}"] = piece
        else:
            found[new] = tensor.T if name in TRANSPOSED else tensor
    return found


def clip_config(tensors: dict[str, Tensor], file: Path) -> Any:
    """The sizes of a CLIP in open_clip's form.

    Raises:
        ValueError: a tensor that the sizes are read off is missing.
    """
    shape = shape_reader(tensors, file, f"HPSv2's checkpoint ({WEIGHTS})")

    width, _, patch, _ = shape("visual.conv1.weight")
    side = round((shape("visual.positional_embedding")[0] - 1) ** 0.5) * patch
    length, text_width = shape("positional_embedding")
    vision = {
        "hidden_size": width, "image_size": side, "patch_size": patch,
        "intermediate_size": shape("visual.transformer.resblocks.0.mlp.c_fc.weight")[0],
        "num_hidden_layers": depth(tensors, "visual.transformer.resblocks."),
        "num_attention_heads": HEADS_OF_WIDTH.get(width, max(1, width // 64)), "hidden_act": "gelu",
    }  # fmt: skip
    text = {
        "hidden_size": text_width, "vocab_size": shape("token_embedding.weight")[0], "max_position_embeddings": length,
        "intermediate_size": shape("transformer.resblocks.0.mlp.c_fc.weight")[0],
        "num_hidden_layers": depth(tensors, "transformer.resblocks."),
        "num_attention_heads": max(1, text_width // 64), "hidden_act": "gelu",
        "eos_token_id": 2,  # says: the embedding is read at the highest token, as open_clip does
    }  # fmt: skip
    config = transformers_class("hps-v2", "CLIPConfig")
    return config(vision_config=vision, text_config=text, projection_dim=shape("text_projection")[1])


def load_hps(source: str, device: torch.device | str = "cpu") -> ClipReward:
    """HPSv2: the cosine of its CLIP (about 0.27; its tables show 100 times that); images are padded to a square.

    Args:
        source: a folder with the checkpoint and CLIP's tokenizer, or the checkpoint's hub id.

    Raises:
        ValueError: files that are missing, damaged or of another model, or transformers is not installed.
    """
    file, words = find_checkpoint("hps-v2", source, WEIGHTS, TOKENIZER_SOURCE)
    tensors = read_weights(file, "state_dict")
    config = clip_config(tensors, file)
    with torch.device("meta"):
        model = transformers_class("hps-v2", "CLIPModel")(config)
    load_strict(model, clip_tensors(tensors), file)
    model = model.to(device).eval().requires_grad_(False)
    side = config.vision_config.image_size
    return ClipReward(model, load_tokenizer("hps-v2", words), Preprocessing(side, side, "pad"), scale=1.0)
