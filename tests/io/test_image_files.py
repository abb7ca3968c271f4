"""The one reader of image files: upright, over white, 8 bits, from whatever people's cameras and tools write."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from marval.io.images import centre_crop, image_size, pixels, printable, read_image, readable_suffixes

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.stack([RAMP, RAMP.T, 255 - RAMP], axis=2)
DEEP = RAMP.astype(np.uint16) * 257
WHITE, RED, GREEN, BLUE = [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]


def saved(picture, suffix="png", **options):
    buffer = io.BytesIO()
    names = {"jpg": "JPEG", "tif": "TIFF", "jp2": "JPEG2000"}
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    picture.save(buffer, format=names.get(suffix, suffix.upper()), **options)
    buffer.seek(0)
    return buffer


def palette(*colours, suffix="png", **options):
    picture = Image.fromarray(np.array([range(len(colours))], np.uint8), "P")
    picture.putpalette([level for colour in colours for level in colour])
    return saved(picture, suffix, **options)


RGBA = np.array([[[255, 0, 0, 255], [0, 255, 0, 0], [0, 0, 0, 128]]], np.uint8)  # red, hidden green, half of black
OVER_WHITE = [[RED, WHITE, [127, 127, 127]]]
KEYED = np.array([[[1, 2, 3], [1, 2, 4]]], np.uint8)
KINDS = {
    **{f"colour, {suffix}": (saved(COLOURS, suffix), COLOURS) for suffix in ("png", "bmp", "tif", "ppm", "tga", "ico")},
    "colour, webp": (saved(COLOURS, "webp", lossless=True), COLOURS),
    **{f"grey, {suffix}": (saved(RAMP, suffix), RAMP) for suffix in ("png", "bmp", "gif", "tif", "ppm", "tga")},
    **{f"16 bits, {suffix}": (saved(DEEP, suffix), RAMP) for suffix in ("png", "tif", "ppm")},
    "16 bits, jp2": (saved(DEEP, "jp2", irreversible=False), RAMP),
    "10 bits": (
        io.BytesIO(b"P5 256 1 1023\n" + b"".join(struct.pack(">H", 4 * i) for i in range(256))),
        [np.round(np.arange(256) * 4 * 255 / 1023)],
    ),
    "1 bit": (saved(RAMP > 99), np.where(RAMP > 99, 255, 0)),
    **{f"transparent, {suffix}": (saved(RGBA, suffix), OVER_WHITE) for suffix in ("png", "tif", "tga")},
    "transparent, webp": (saved(RGBA, "webp", lossless=True, exact=True), OVER_WHITE),
    "transparent grey": (saved(np.array([[[9, 255], [9, 0], [0, 128]]], np.uint8)), [[9, 255, 127]]),
    "transparent, png's palette": (palette(RED, GREEN, BLUE, transparency=1), [[RED, WHITE, BLUE]]),
    "transparent, shares": (
        palette(RED, GREEN, BLUE, transparency=bytes([255, 0, 128])), [[RED, WHITE, [127, 127, 255]]],
    ),
    "transparent, gif": (palette(RED, GREEN, BLUE, suffix="gif", transparency=1), [[RED, WHITE, BLUE]]),
    "one transparent value": (saved(np.array([[7, 8]], np.uint8), transparency=7), [[255, 8]]),
    "one transparent colour": (saved(KEYED, transparency=(1, 2, 3)), [[WHITE, [1, 2, 4]]]),
    "grey palette": (palette([5, 5, 5], [90, 90, 90]), [[5, 90]]),
    "nearly grey palette": (palette([5, 5, 5], [90, 90, 91]), [[[5, 5, 5], [90, 90, 91]]]),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_tools_write_is_read_in_8_bits_over_white(kind):
    source, expected = KINDS[kind]
    picture = read_image(source)
    assert picture.mode in ("L", "RGB")
    assert np.asarray(picture).tolist() == np.asarray(expected).tolist()


@pytest.mark.parametrize("array", [RAMP.astype(np.float32), RAMP.astype(np.int32)])
def test_numbers_whose_white_is_unknown_are_refused(array):
    with pytest.raises(ValueError, match=r"this file cannot be read .*whose white is unknown"):
        read_image(saved(array, "tif"))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_pictures_stand_upright_whatever_exif_says(turn, suffix, tmp_path):
    """A picture with a dark left third and a darker top, stored turned: it comes back as it was meant."""
    meant = np.full((48, 96), 200, np.uint8)
    meant[:, :32], meant[:16] = 100, 20
    undo = {2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1], 5: lambda a: a.T,
            6: lambda a: np.rot90(a), 7: lambda a: a[::-1, ::-1].T, 8: lambda a: np.rot90(a, -1)}  # fmt: skip
    stored = Image.fromarray(np.ascontiguousarray(undo.get(turn, lambda a: a)(meant))).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = turn
    file = tmp_path / f"turned.{suffix}"
    stored.save(file, exif=exif, **({"quality": 95} if suffix == "jpg" else {}))
    upright = np.asarray(read_image(file).convert("L")).astype(int)
    assert upright.shape == meant.shape
    assert np.abs(upright - meant).mean() < 2
    if suffix == "jpg":
        assert image_size(file) == (96, 48)


def test_damaged_metadata_does_not_cost_the_picture():
    for damage in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"):
        assert read_image(saved(RAMP, "jpg", exif=damage)).size == (16, 16)


@pytest.mark.parametrize("suffix", ["jpg", "tif"])  # Pillow writes the JPEG inverted, as Adobe does
def test_cmyk_is_read_as_colours(suffix):
    ink = np.zeros((16, 32, 4), np.uint8)
    ink[:, :16, 0] = ink[:, 16:, 3] = 255  # cyan, black
    picture = np.asarray(read_image(saved(Image.fromarray(ink, "CMYK"), suffix))).astype(int)
    assert np.abs(picture[8, 8] - [0, 255, 255]).max() <= 3
    assert picture[8, 24].max() <= 3


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif", "mpo"])
def test_of_several_pictures_the_first_is_read(suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    picture = read_image(saved(frames[0], suffix, save_all=True, append_images=frames[1:]))
    assert np.abs(np.asarray(picture)[4, 4].astype(int) - RED).max() <= 2


def test_large_pictures_are_refused_by_their_headers():
    head = saved(np.zeros((1, 1), np.uint8)).getvalue()
    size = struct.pack(">II", 2**20, 2**7)  # 134 million pixels are promised
    bomb = head[:16] + size + head[24:29] + struct.pack(">I", zlib.crc32(head[12:16] + size + head[24:29])) + head[33:]
    with pytest.raises(ValueError, match="1048576x128 pixels, expected at most 25,000,000"):
        read_image(io.BytesIO(bomb), most_pixels=25_000_000)


def test_what_is_no_image_is_named_in_one_line(tmp_path):
    noise = saved(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).getvalue()
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"  # another program would run it
    for name, content in {
        "text.png": b"not a picture",
        "empty.jpg": b"",
        "half.png": noise[:2000],
        "eps.png": eps,
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} cannot be read as an image \(.*\): mend or remove it$"):
            read_image(tmp_path / name)
    with pytest.raises(ValueError, match="format"):
        read_image(saved(RAMP, "tif"), formats=("PNG", "JPEG"))
    assert printable("naïve 猫 caf\udce9.png") == "naïve 猫 caf\\xe9.png"
    assert {".png", ".jpg", ".jfif", ".webp", ".gif", ".tif", ".pgm", ".tga", ".mpo"} <= readable_suffixes()
    assert not {".pdf", ".eps", ".txt"} & readable_suffixes()


@pytest.mark.parametrize("size", [(400, 300), (90, 33), (17, 16), (12, 9)])
def test_a_centre_crop_takes_the_middle_and_keeps_proportions(size):
    """A disc in the middle of a wide picture stays a disc in the middle, at any scale; a small picture grows."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    inside = (y + 0.5 - height / 2) ** 2 + (x + 0.5 - width / 2) ** 2 < (0.35 * height) ** 2
    disc = np.asarray(centre_crop(Image.fromarray((inside * 255).astype(np.uint8)), 16)) / 255
    assert disc.shape == (16, 16)
    assert disc.sum() == pytest.approx(np.pi * (0.35 * 16) ** 2, rel=0.12)
    places = np.arange(16) + 0.5
    for share in (disc.sum(axis=0), disc.sum(axis=1)):
        assert share @ places / share.sum() == pytest.approx(8, abs=0.6)  # an odd side cannot be halved
        assert ((places - 8) ** 2 @ share / share.sum()) ** 0.5 == pytest.approx(0.35 * 16 / 2, rel=0.1)


def test_a_large_jpeg_is_decoded_as_small_as_is_enough(tmp_path):
    """A photo of 12 megapixels takes a tenth of the time so."""
    colours = np.random.default_rng(0).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(colours).resize((1200, 900), Image.Resampling.BICUBIC).save(tmp_path / "photo.jpg", quality=95)
    whole, draft = read_image(tmp_path / "photo.jpg"), read_image(tmp_path / "photo.jpg", draft=64)
    assert (whole.size, draft.size) == ((1200, 900), (150, 113))
    difference = pixels(whole, (32, 32)).astype(int) - pixels(draft, (32, 32))
    assert np.abs(difference).mean() < 2
