"""Prompts as people type them, to what a model of text reads: a sentence's embedding, and a style."""

import difflib
import functools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from marval.config import ModelConfig
from marval.io.text import load_encoder
from marval.model import MAR
from marval.model.mar import prompt_vectors
from marval.runtime.rng import whole_number

LONGEST = 1000  # characters of a prompt
# Prompts to try, which the bundled models of emoji know.
SUGGESTED = "taxi", "pizza", "shark", "ghost", "rocket", "sunflower", "cat face", "blue heart"


@dataclass(frozen=True)
class TextPrompt:
    """A prompt as a model of text reads it."""

    sentence: str  # as the model knows it or, where it does not, as it was typed; without its style
    style: int = 0  # its number among the model's; 0 where it has none
    known: int | None = None  # the number of the sentence among those that the model knows

    def name(self, config: ModelConfig) -> str:
        """The prompt in words, such as "taxi, 3d style"."""
        return f"{self.sentence}, {config.styles[self.style]} style" if config.styles else self.sentence

    def label(self, config: ModelConfig) -> int | None:
        """Its label, where the model knows it (see `marval.classes.label_names`)."""
        return None if self.known is None else self.known * config.mar.labels_per_class + self.style


def plain_sentence(text: str) -> str:
    """A sentence without what does not matter: case, spaces, an article in front, how accents are written."""
    words = unicodedata.normalize("NFC", text).casefold().split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)


@functools.lru_cache(maxsize=8)
def numbers_of(sentences: tuple[str, ...]) -> dict[str, int]:
    """The number of each sentence, by its plain form."""
    return {plain_sentence(sentence): number for number, sentence in reversed([*enumerate(sentences)])}


def plain_style(text: str) -> str:
    """A style by its letters and digits: "3-D style" is "3d"."""
    return re.sub(r"[\W_]", "", text.casefold()).removesuffix("style")


def style_number(style: str, config: ModelConfig) -> int:
    """The number of a style, however it is written.

    Raises:
        ValueError: the model has no such style.
    """
    names = [plain_style(name) for name in config.styles]
    if plain_style(style) not in names:
        raise ValueError(
            f"style {style[:60]!r}: expected {', '.join(config.styles) or 'none, because the model has no styles'}"
        )
    return names.index(plain_style(style))


def read_prompt(item: str | SupportsIndex, config: ModelConfig, style: str | None = None) -> TextPrompt:
    """Read a prompt, which may end with a comma and one of the model's styles: "a taxi, 3-D style"; or a label.

    Args:
        style: where the prompt itself names none; the model's first when None.

    Raises:
        ValueError: an unknown style, an empty prompt, or no label of the model.
    """
    if not isinstance(item, str):
        try:
            label = whole_number(item)
        except TypeError as error:
            raise ValueError(f"{error}: expected a prompt, or the number of one") from None
        if not 0 <= label < config.mar.num_labels:
            raise ValueError(f"prompt number {label}: expected 0 to {config.mar.num_labels - 1}")
        known, number = divmod(label, config.mar.labels_per_class)
        return TextPrompt(config.class_names[known], number, known)
    sentence, number = item, 0 if style is None else style_number(style, config)
    front, _, end = item.rpartition(",")
    if front.strip() and plain_style(end) in map(plain_style, config.styles):
        sentence, number = front, style_number(end, config)
    sentence = sentence.strip()
    if not 1 <= len(sentence) <= LONGEST:
        raise ValueError(f"prompt {item[:60]!r}: expected 1 to {LONGEST} characters")
    place = numbers_of(config.class_names).get(plain_sentence(sentence))
    return TextPrompt(sentence if place is None else config.class_names[place], number, place)


def vectors_of(prompts: Sequence[TextPrompt], config: ModelConfig, model: MAR) -> Float[Tensor, "b f"]:
    """What `MAR.embed` takes of prompts; those that the model does not know are encoded.

    Raises:
        ValueError: a prompt that the model does not know, and no encoder here; the nearest known ones are suggested.
    """
    known, weight = model.vocabulary, model.fake_latent
    if not prompts:
        return torch.zeros(0, config.mar.text_dim + config.mar.num_styles)
    sentences = torch.stack(
        [known[p.known] if p.known is not None else encoded(p.sentence, config).to(known) for p in prompts]
    )
    styles = torch.tensor([prompt.style for prompt in prompts], device=weight.device)
    return prompt_vectors(sentences.to(weight.dtype), styles, len(config.styles))


def alike(sentence: str, known: Sequence[str], count: int = 3) -> list[str]:
    """The known sentences that are made of words of another one, as far as there are any, or are spelled alike."""
    text = plain_sentence(sentence)

    def share(name: str) -> float:
        words = plain_sentence(name).split()
        return sum(len(word) for word in words if word in text.split()) / sum(map(len, words))

    shares = {name: share(name) for name in known}
    common = [name for name in sorted(shares, key=shares.__getitem__, reverse=True) if shares[name] >= 0.25]
    return [*dict.fromkeys([*common, *difflib.get_close_matches(text, known, n=count, cutoff=0.4)])][:count]


def encoded(sentence: str, config: ModelConfig) -> Float[Tensor, " e"]:
    """A sentence's embedding by a model's encoder.

    Raises:
        ValueError: as `vectors_of`.
    """
    try:
        embedding = remembered(sentence, config.encoder)
        if len(embedding) != config.mar.text_dim:
            raise ValueError(
                f"its encoder {config.encoder} is another one here, of {len(embedding)} numbers a sentence"
            )
        return embedding
    except ValueError as error:
        near = alike(sentence, config.class_names) or config.class_names[:5]
        known = ", ".join(map(repr, near))
        raise ValueError(
            f"{sentence[:60]!r} is none of the prompts that the model knows ({known}, ...): {error}"
        ) from None


@functools.lru_cache(maxsize=1000)
def remembered(sentence: str, encoder: str) -> Float[Tensor, " e"]:
    """A sentence's embedding, rounded as those that models know are."""
    return load_encoder(encoder)([sentence])[0].half()


def nearest_prompts(prompt: str, config: ModelConfig, model: MAR, count: int = 3) -> list[str]:
    """The prompts that the model knows whose meaning is nearest to another's, the nearest first, without styles.

    Raises:
        ValueError: as `vectors_of`.
    """
    embedding = encoded(read_prompt(prompt, config).sentence, config).float()
    near = (model.vocabulary.float().cpu() @ embedding).topk(min(count, config.mar.num_classes))
    return [config.class_names[i] for i in near.indices.tolist()]
