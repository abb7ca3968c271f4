"""`hps-v2`: Human Preference Score v2.1 (Wu et al. 2023), from its own file: a CLIP ViT-H/14 of open_clip."""

from pathlib import Path
from typing import Any

import torch

from marval.rewards import weights
from marval.rewards.clip import ClipReward
from marval.rewards.preprocess import Preprocessing

# ViT-H/14, as transformers configures it.
VISION: dict[str, Any] = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 14, "hidden_act": "gelu",
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "max_position_embeddings": 77, "vocab_size": 49408, "hidden_act": "gelu",
    "eos_token_id": 2,  # makes CLIPModel read the embedding at the highest token, as open_clip does
}  # fmt: skip
EMBEDDING = 1024

# The names of open_clip, and those of transformers' CLIPModel.
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
    (r"\.attn\.", ".self_attn."),
)


def clip_tensors(tensors: weights.Tensors) -> weights.Tensors:
    """Give open_clip's tensors the names of transformers' CLIPModel; queries, keys and values come apart."""
    split: weights.Tensors = {}
    for name, tensor in tensors.items():
        if ".in_proj_" in name:
            parts = zip("qkv", tensor.chunk(3), strict=True)
            split |= {name.replace("in_proj_", f"{part}_proj."): piece for part, piece in parts}
        else:  # open_clip multiplies by its two projections from the right
            split[name] = tensor.T if name in ("visual.proj", "text_projection") else tensor
    return weights.renamed(split, RENAMED)


def load_hps(source: str, device: torch.device | str = "cpu") -> ClipReward:
    """Load HPSv2: the cosine of its CLIP (about 0.27; its tables show 100 times that), of images padded to a square.

    Args:
        source: a folder with the checkpoint, of v2.1 or v2, and CLIP's tokenizer; or the hub id of v2.1's.
    """
    folder = weights.find_folder(source, "HPS_v2.1_compressed.pt")
    file, tensors = weights.read_weights(folder, "*.pt")
    library = weights.transformers()
    config = library.CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=EMBEDDING)
    model = weights.load_strict(lambda: library.CLIPModel(config), clip_tensors(tensors), file).to(device)
    words = folder if Path(source).is_dir() else weights.find_folder(weights.CLIP, *weights.TOKENIZER)  # the same words
    tokenizer = weights.from_folder("CLIPTokenizer", words)
    return ClipReward(model, tokenizer, Preprocessing(VISION["image_size"], "pad"), scale=1.0)
