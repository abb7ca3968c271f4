"""Captions of images: a table `captions.csv` (or `metadata.csv`) in their folder, or a text file beside each."""

import csv
import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from marval.io.files import one_line
from marval.io.images import printable
from marval.io.text import embed_texts, encoder_place
from marval.model.mar import prompt_vectors
from marval.runtime.philox import random_words

TABLES = "captions.csv", "metadata.csv"  # the latter as Hugging Face's image folders have it
TRAIN = "train"  # the split of images whose row names none


@dataclass
class Entry:
    """What is said of an image."""

    captions: list[str] = field(default_factory=list)
    style: str = ""
    concept: str = ""  # what it shows, in few words: a prompt that models will know; its first caption when left out
    split: str = TRAIN


@dataclass(frozen=True, eq=False)
class Captions:
    """The captions and styles of a set of images, in the order of the images."""

    encoder: str  # the sentence encoder (see `marval.io.text`)
    texts: tuple[str, ...]  # all different ones, each once; the names of concepts first
    rows: Int[Tensor, " k"]  # the places in `texts` of the captions of the first image, of the second, ...
    starts: Int[Tensor, " n1"]  # of each image's captions in `rows`, and their end
    styles: tuple[str, ...]
    style: Int[Tensor, " n"]  # of each image; -1: none

    def to_dict(self) -> dict[str, Any]:
        """All but the encoder, ready for JSON."""
        lists = {name: getattr(self, name).tolist() for name in ("rows", "starts", "style")}
        return {"texts": self.texts, "styles": self.styles, **lists}

    @classmethod
    def from_dict(cls, values: dict[str, Any], encoder: str) -> "Captions":
        """The inverse of `to_dict`."""
        rows, starts, style = (torch.tensor(values[name]) for name in ("rows", "starts", "style"))
        return cls(encoder_place(encoder), tuple(values["texts"]), rows, starts, tuple(values["styles"]), style)

    @functools.cached_property
    def sentences(self) -> Float[Tensor, "t e"]:
        """The embeddings of `texts`, in half precision."""
        return embed_texts(self.texts, self.encoder)

    def draw(self, images: Int[Tensor, " b"], keys: Int[Tensor, " b"]) -> Float[Tensor, "b f"]:
        """The prompt vectors of images: of each one of its captions, drawn by its key."""
        first, last = self.starts[images], self.starts[images + 1]
        chosen = self.rows[first + random_words(keys, 1)[:, 0] % (last - first)]
        return prompt_vectors(self.sentences[chosen].float(), self.style[images], len(self.styles))


@dataclass(frozen=True)
class Captioned:
    """A folder of images with captions."""

    entries: dict[str, Entry]  # by the path of the image, of every split

    @functools.cached_property
    def concepts(self) -> tuple[str, ...]:
        """All concepts, in the order of their first image."""
        return tuple(dict.fromkeys(entry.concept for entry in self.entries.values()))

    def files(self, split: str) -> list[tuple[str, int]]:
        """The images of a split, each with the number of its concept.

        Raises:
            ValueError: there are none.
        """
        numbers = {concept: number for number, concept in enumerate(self.concepts)}
        files = [(file, numbers[entry.concept]) for file, entry in self.entries.items() if entry.split == split]
        if not files:
            known = ", ".join(dict.fromkeys(entry.split for entry in self.entries.values()))
            raise ValueError(f"no images of the split {split!r}: expected one of {known}")
        return files

    def captions(self, files: Sequence[str], encoder: str) -> Captions:
        """The captions of some of the images; each is called by its concept, too."""
        said = [dict.fromkeys([*self.entries[file].captions, self.entries[file].concept]) for file in files]
        texts = tuple(dict.fromkeys([*self.concepts, *(text for each in said for text in each)]))
        places = {text: place for place, text in enumerate(texts)}
        styles = tuple(dict.fromkeys(entry.style for entry in self.entries.values() if entry.style))
        style = [styles.index(self.entries[file].style) if self.entries[file].style else -1 for file in files]
        starts = torch.tensor([0, *(len(each) for each in said)]).cumsum(0)
        rows = torch.tensor([places[text] for each in said for text in each])
        return Captions(encoder_place(encoder), texts, rows, starts, styles, torch.tensor(style))


def find_captions(root: Path, images: Sequence[str]) -> Captioned | None:
    """Read the captions of a folder: of its table or, where each of its own `images` has one, of text files.

    Several captions stand between | marks, in a text file also on lines of their own; several rows of the table may
    name one image.

    Raises:
        ValueError: a table that cannot be read, or that misses a column, a caption or an image.
    """
    for name in TABLES:
        header = next(table(root / name), ()) if (root / name).is_file() else ()
        if "file_name" in header and ("caption" in header or "text" in header):
            return read_table(root / name)
    texts = [Path(image).with_suffix(".txt") for image in images]
    if not texts or not all(text.is_file() for text in texts):
        return None
    entries = {}
    for image, text in zip(images, texts, strict=True):
        try:
            entries[image] = entry = Entry(split_captions(text.read_text(encoding="utf-8-sig")))
        except (OSError, ValueError) as error:
            raise ValueError(f"{printable(text)} cannot be read as a text ({one_line(error)})") from None
        finish(entry, str(text))
    return Captioned(entries)


def table(file: Path) -> Iterator[list[str]]:
    """The rows of a table, the header first.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as content:
            yield from csv.reader(content)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{printable(file)} cannot be read as a table ({one_line(error)})") from None


def read_table(file: Path) -> Captioned:
    """Read a table: file_name (from its folder on), caption or text, and perhaps style, concept and split."""
    header, *rows = table(file)
    entries: dict[str, Entry] = {}
    for number, row in enumerate(rows, 2):
        place = f"{printable(file)}, row {number}"
        if not any(row):
            continue
        if len(row) > len(header):
            raise ValueError(f"{place}: {len(row)} cells, expected {len(header)}; put a caption with commas in quotes")
        said = {name: value.strip() for name, value in zip(header, row, strict=False)}
        image = file.parent / said.get("file_name", "")
        if not image.is_file():
            raise ValueError(f"{place}: no image {printable(image)}")
        entry = entries.setdefault(str(image), Entry())
        entry.captions += split_captions(said.get("caption") or said.get("text", ""))
        for name in ("style", "concept", "split"):
            setattr(entry, name, said.get(name) or getattr(entry, name))
        finish(entry, place)
    if not entries:
        raise ValueError(f"{printable(file)}: expected a row for each image")
    return Captioned(entries)


def finish(entry: Entry, place: str) -> None:
    """Call an image that names no concept by its first caption, and refuse one without captions."""
    if not entry.captions and not entry.concept:
        raise ValueError(f"{place}: no caption; expected one, or several with | between them")
    entry.concept = entry.concept or entry.captions[0]


def split_captions(text: str) -> list[str]:
    """The captions in a text, between | marks or on lines of their own."""
    return [caption for part in re.split(r"[|\n]", text) if (caption := " ".join(part.split()))]
