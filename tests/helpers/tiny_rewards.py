"""Small random models on disk, in the formats and under the names that the rewards' real weights have."""

import json
import string
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from marval.rewards import hps, image_reward
from marval.runtime.rng import generator

SIDE = 32
WORDS = string.ascii_lowercase


@pytest.fixture(scope="module")
def tiny_sizes():
    """Give HPSv2 and ImageReward the sizes of the files here."""
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 1}
    images = {"image_size": SIDE, "patch_size": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hps, "EMBEDDING", 40)
        for module, length, words in ((hps, 16, 54), (image_reward, 40, 59)):
            words = {"max_position_embeddings": length, "vocab_size": words}
            patch.setattr(module, "VISION", {**module.VISION, **vision, **images})
            patch.setattr(module, "TEXT", {**module.TEXT, **text, **words, "encoder_hidden_size": 128})
        yield


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


def part(**children):
    """A module with these parameters and modules in it."""
    module = nn.Module()
    for name, child in children.items():
        setattr(module, name, child)
    return module


def empty(*shape):
    return nn.Parameter(torch.empty(shape))


class OpenClipBlock(nn.Module):
    """open_clip's residual attention block."""

    def __init__(self, width):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, max(1, width // 64), batch_first=True)
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": nn.GELU(), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


def tower(width, depth):
    return part(resblocks=nn.ModuleList([OpenClipBlock(width) for _ in range(depth)]))


class OpenClip(nn.Module):
    """open_clip's CLIP, written anew with torch's own attention: the reference of HPSv2's file."""

    def __init__(self, words, width=128, text_width=64, embedding=40, length=16):
        super().__init__()
        self.visual = part(
            class_embedding=empty(width), positional_embedding=empty((SIDE // 8) ** 2 + 1, width),
            conv1=nn.Conv2d(3, width, 8, 8, bias=False), ln_pre=nn.LayerNorm(width), ln_post=nn.LayerNorm(width),
            transformer=tower(width, 2), proj=empty(width, embedding),
        )  # fmt: skip
        self.token_embedding, self.positional_embedding = nn.Embedding(words, text_width), empty(length, text_width)
        self.transformer, self.ln_final = tower(text_width, 3), nn.LayerNorm(text_width)
        self.text_projection, self.logit_scale = empty(text_width, embedding), nn.Parameter(torch.tensor(2.0))

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


def attention(q, k, v, mask=None):
    """Attention of heads with 64 channels (or one head)."""
    q, k, v = (x.unflatten(-1, (max(1, x.shape[-1] // 64), -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


class TimmBlock(nn.Module):
    """The block of BLIP's image encoder (timm's)."""

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = part(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width))
        self.mlp = part(fc1=nn.Linear(width, 4 * width), fc2=nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attn.proj(attention(*self.attn.qkv(self.norm1(x)).chunk(3, dim=-1)))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class BertLayer(nn.Module):
    """The layer of BLIP's text encoder: BERT's, with attention to the image after that to the text."""

    def __init__(self, width, image_width):
        super().__init__()

        def attend(inputs):
            layers = {"query": nn.Linear(width, width), "key": nn.Linear(inputs, width)}
            inner = part(**layers, value=nn.Linear(inputs, width))
            outer = part(dense=nn.Linear(width, width), LayerNorm=nn.LayerNorm(width, eps=1e-12))
            return nn.ModuleDict({"self": inner, "output": outer})

        self.attention, self.crossattention = attend(width), attend(image_width)
        self.intermediate = part(dense=nn.Linear(width, 4 * width))
        self.output = part(dense=nn.Linear(4 * width, width), LayerNorm=nn.LayerNorm(width, eps=1e-12))

    def forward(self, x, mask, image):
        mask = mask[:, None, None].bool()
        for layer, source, seen in ((self.attention, None, mask), (self.crossattention, image, None)):
            inner, outer, source = layer["self"], layer["output"], x if source is None else source
            attended = attention(inner.query(x), inner.key(source), inner.value(source), seen)
            x = outer.LayerNorm(outer.dense(attended) + x)
        return self.output.LayerNorm(self.output.dense(F.gelu(self.intermediate.dense(x))) + x)


def score_layers(inputs):
    """The five layers of the heads of ImageReward and of the aesthetic predictor, by their numbers."""
    widths = (inputs, 1024, 128, 64, 16, 1)
    return nn.ModuleDict({str(i): nn.Linear(*widths[n : n + 2]) for n, i in enumerate((0, 2, 4, 6, 7))})


class OriginalImageReward(nn.Module):
    """ImageReward under the names of its own file, written anew: the reference."""

    def __init__(self, words, width=128, text_width=64):
        super().__init__()
        vision = part(
            cls_token=empty(1, 1, width), pos_embed=empty(1, (SIDE // 8) ** 2 + 1, width),
            patch_embed=part(proj=nn.Conv2d(3, width, 8, 8)),
            blocks=nn.ModuleList([TimmBlock(width) for _ in range(2)]), norm=nn.LayerNorm(width, eps=1e-6),
        )  # fmt: skip
        embeddings = part(
            word_embeddings=nn.Embedding(words, text_width), position_embeddings=nn.Embedding(40, text_width),
            LayerNorm=nn.LayerNorm(text_width, eps=1e-12),
        )  # fmt: skip
        embeddings.register_buffer("position_ids", torch.arange(40)[None])
        encoder = part(layer=nn.ModuleList([BertLayer(text_width, width) for _ in range(3)]))
        self.blip = part(
            visual_encoder=vision, text_encoder=part(embeddings=embeddings, encoder=encoder),
            vision_proj=nn.Linear(width, 8), text_proj=nn.Linear(text_width, 8),
        )  # fmt: skip
        self.mlp = part(layers=score_layers(text_width))

    def forward(self, pixels, tokens, mask):
        vision, text = self.blip.visual_encoder, self.blip.text_encoder
        x = vision.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([vision.cls_token.expand(len(x), -1, -1), x], dim=1) + vision.pos_embed
        for block in vision.blocks:
            x = block(x)
        image, embeddings = vision.norm(x), text.embeddings
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
    head = random_weights(score_layers(24), "aesthetic")
    tensors = {f"layers.{name}": tensor for name, tensor in head.state_dict().items()}
    torch.save(tensors, folder / "sac+logos+ava1-l14-linearMSE.pth")
    return model, head
