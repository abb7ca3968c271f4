"""Small random models on disk, in the formats and under the names that the rewards' real weights have."""

import json
import string

import torch
import torch.nn.functional as F
from torch import nn

from marval.runtime.rng import generator

SIDE = 32
WORDS = string.ascii_lowercase


def write_clip_tokenizer(folder):
    tokens = [*WORDS, *(letter + "</w>" for letter in WORDS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return len(tokens)


def write_bert_tokenizer(folder):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *("##" + letter for letter in WORDS)]
    (folder / "vocab.txt").write_text("\n".join(tokens))
    return len(tokens) + 2  # BLIP's [DEC] and [ENC]


def random_weights(network, name):
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator(name, parameter.numel()))
    return network.eval().requires_grad_(False)


def write_clip(folder, width=64):
    """A CLIP in transformers' form; the model is returned."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder.mkdir(parents=True, exist_ok=True)
    words = write_clip_tokenizer(folder)
    sizes = {"hidden_size": width, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={**sizes, "image_size": SIDE, "patch_size": 8},
        text_config={**sizes, "vocab_size": words, "max_position_embeddings": 16, "eos_token_id": words - 1},
        projection_dim=24,
    )
    model = random_weights(CLIPModel(config), "clip")
    model.logit_scale.data.fill_(3.0)
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(
        folder
    )
    return model


class OpenClipBlock(nn.Module):
    """open_clip's residual attention block."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


def tower(width, depth):
    transformer = nn.Module()
    transformer.resblocks = nn.ModuleList([OpenClipBlock(width, max(1, width // 64)) for _ in range(depth)])
    return transformer


class OpenClip(nn.Module):
    """open_clip's CLIP, written anew with torch's own attention: the reference of HPSv2's file."""

    def __init__(self, words, width=128, text_width=64, embedding=40, length=16):
        super().__init__()
        self.visual = nn.Module()
        self.visual.class_embedding = nn.Parameter(torch.empty(width))
        self.visual.positional_embedding = nn.Parameter(torch.empty((SIDE // 8) ** 2 + 1, width))
        self.visual.conv1 = nn.Conv2d(3, width, 8, 8, bias=False)
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.visual.transformer = tower(width, 2)
        self.visual.proj = nn.Parameter(torch.empty(width, embedding))
        self.transformer = tower(text_width, 3)
        self.token_embedding = nn.Embedding(words, text_width)
        self.positional_embedding = nn.Parameter(torch.empty(length, text_width))
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.empty(text_width, embedding))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, pixels, tokens):
        """The cosine of each image with its text."""
        v = self.visual
        x = v.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], dim=1) + v.positional_embedding
        x = v.ln_pre(x)
        for block in v.transformer.resblocks:
            x = block(x)
        image = v.ln_post(x[:, 0]) @ v.proj
        y = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        mask = torch.full((tokens.shape[1],) * 2, float("-inf"), dtype=y.dtype).triu(1)
        for block in self.transformer.resblocks:
            y = block(y, mask)
        text = self.ln_final(y)[torch.arange(len(y)), tokens.argmax(dim=1)] @ self.text_projection
        return F.cosine_similarity(image, text)


def write_hps(folder):
    """HPSv2's checkpoint; the reference network is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    network = random_weights(OpenClip(write_clip_tokenizer(folder)), "hps")
    torch.save({"epoch": 1, "name": "hps", "state_dict": network.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    return network


class TimmBlock(nn.Module):
    """The block of BLIP's image encoder (timm's)."""

    def __init__(self, width):
        super().__init__()
        self.heads = max(1, width // 64)
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.attn.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        x = x + self.attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class BertLayer(nn.Module):
    """The layer of BLIP's text encoder: BERT's, with attention to the image after that to the text."""

    def __init__(self, width, image_width):
        super().__init__()
        self.heads = max(1, width // 64)
        for name, inputs in (("attention", width), ("crossattention", image_width)):
            part = nn.Module()
            part.self, part.output = nn.Module(), nn.Module()
            part.self.query = nn.Linear(width, width)
            part.self.key, part.self.value = nn.Linear(inputs, width), nn.Linear(inputs, width)
            part.output.dense, part.output.LayerNorm = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-12)
            self.add_module(name, part)
        self.intermediate, self.output = nn.Module(), nn.Module()
        self.intermediate.dense = nn.Linear(width, 2 * width)
        self.output.dense, self.output.LayerNorm = nn.Linear(2 * width, width), nn.LayerNorm(width, eps=1e-12)

    def attend(self, part, x, source, mask):
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, y in ((part.self.query, x), (part.self.key, source), (part.self.value, source))
        )
        mask = None if mask is None else mask[:, None, None].bool()
        attended = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        return part.output.LayerNorm(part.output.dense(attended) + x)

    def forward(self, x, mask, image):
        x = self.attend(self.attention, x, x, mask)
        x = self.attend(self.crossattention, x, image, None)
        return self.output.LayerNorm(self.output.dense(F.gelu(self.intermediate.dense(x))) + x)


class OriginalImageReward(nn.Module):
    """ImageReward under the names of its own file, written anew: the reference."""

    def __init__(self, words, width=128, text_width=64):
        super().__init__()
        blip = self.blip = nn.Module()
        vision = blip.visual_encoder = nn.Module()
        vision.cls_token = nn.Parameter(torch.empty(1, 1, width))
        vision.pos_embed = nn.Parameter(torch.empty(1, (SIDE // 8) ** 2 + 1, width))
        vision.patch_embed = nn.Module()
        vision.patch_embed.proj = nn.Conv2d(3, width, 8, 8)
        vision.blocks = nn.ModuleList([TimmBlock(width) for _ in range(2)])
        vision.norm = nn.LayerNorm(width, eps=1e-6)
        text = blip.text_encoder = nn.Module()
        text.embeddings, text.encoder = nn.Module(), nn.Module()
        text.embeddings.word_embeddings = nn.Embedding(words, text_width)
        text.embeddings.position_embeddings = nn.Embedding(40, text_width)
        text.embeddings.LayerNorm = nn.LayerNorm(text_width, eps=1e-12)
        text.embeddings.register_buffer("position_ids", torch.arange(40)[None])
        text.encoder.layer = nn.ModuleList([BertLayer(text_width, width) for _ in range(3)])
        blip.vision_proj, blip.text_proj = nn.Linear(width, 8), nn.Linear(text_width, 8)
        self.mlp = nn.Module()
        widths = (text_width, 1024, 128, 64, 16, 1)
        self.mlp.layers = nn.ModuleDict({str(i): nn.Linear(*widths[n : n + 2]) for n, i in enumerate((0, 2, 4, 6, 7))})

    def forward(self, pixels, tokens, mask):
        vision, text = self.blip.visual_encoder, self.blip.text_encoder
        x = vision.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([vision.cls_token.expand(len(x), -1, -1), x], dim=1) + vision.pos_embed
        for block in vision.blocks:
            x = block(x)
        image = vision.norm(x)
        embeddings = text.embeddings
        y = embeddings.word_embeddings(tokens) + embeddings.position_embeddings.weight[: tokens.shape[1]]
        y = embeddings.LayerNorm(y)
        for layer in text.encoder.layer:
            y = layer(y, mask, image)
        y = y[:, 0]
        for layer in self.mlp.layers.values():
            y = layer(y)
        return (y[:, 0] - 0.16717362830052426) / 1.0333394966054072


def write_image_reward(folder):
    """ImageReward's checkpoint; the reference network is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    network = random_weights(OriginalImageReward(write_bert_tokenizer(folder)), "image reward")
    torch.save(network.state_dict(), folder / "ImageReward.pt")
    return network


def write_aesthetic(folder):
    """A CLIP and the aesthetic head's checkpoint beside it; both are returned."""
    model = write_clip(folder)
    widths = (24, 1024, 128, 64, 16, 1)
    head = nn.ModuleDict({str(i): nn.Linear(*widths[n : n + 2]) for n, i in enumerate((0, 2, 4, 6, 7))})
    random_weights(head, "aesthetic")
    torch.save(
        {f"layers.{name}": t for name, t in head.state_dict().items()}, folder / "sac+logos+ava1-l14-linearMSE.pth"
    )
    return model, head
