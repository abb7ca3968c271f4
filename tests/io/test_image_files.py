"""The one reader of image files: upright, over white, 8 bits, from whatever people's cameras and tools write."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageSequence

from marval.io.images import centre_crop, image_size, printable, read_image, readable_suffixes

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.stack([RAMP, RAMP.T, 255 - RAMP], axis=2)
WHITE = [255, 255, 255]


def saved(picture, suffix="png", **options):
    buffer = io.BytesIO()
    names = {"jpg": "JPEG", "tif": "TIFF", "jp2": "JPEG2000"}
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    picture.save(buffer, format=names.get(suffix, suffix.upper()), **options)
    buffer.seek(0)
    return buffer


def values(source):
    picture = read_image(source)
    assert picture.mode in ("L", "RGB")
    return np.asarray(picture)


def png(width, bits, colour, row, *chunks):
    """A PNG of one row by hand, in the bit depths that Pillow does not write."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" + bytes(row)))
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*c) for c in chunks) + data + chunk(b"IEND", b""))


def deep(*numbers):
    """Numbers of 8 bits as PNG's 16."""
    return struct.pack(f">{len(numbers)}H", *(257 * number for number in numbers))


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "tif", "ppm", "tga", "webp", "avif", "ico", "pcx"])
def test_grey_and_colour_come_as_they_are(suffix):
    lossless = {"lossless": True} if suffix == "webp" else {"quality": 100} if suffix == "avif" else {}
    picture = values(saved(COLOURS, suffix, **lossless)).astype(int)
    if suffix != "gif":  # 256 colours of its own choice
        assert picture.shape == COLOURS.shape
        assert np.abs(picture - COLOURS).max() <= (20 if suffix == "avif" else 0)
    if suffix not in ("webp", "avif", "ico"):  # these know no grey
        assert (values(saved(RAMP, suffix)) == RAMP).all()


def tiff_of_12_bits(content, width):
    tags = {256: width, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(content)}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return io.BytesIO(
        b"II*\0" + struct.pack("<I", 8 + len(content)) + content + struct.pack("<H", 9) + directory + bytes(4)
    )


PGM_10_BITS = b"P5 256 1 1023\n" + b"".join(struct.pack(">H", 4 * i) for i in range(256))
DEPTHS = {
    "1 bit": (saved(RAMP > 99), np.where(RAMP > 99, 255, 0)),
    "2 bits": (png(4, 2, 0, [0b00011011]), [[0, 85, 170, 255]]),
    "4 bits": (png(2, 4, 0, [0x0F]), [[0, 255]]),
    "10 bits": (io.BytesIO(PGM_10_BITS), [np.round(np.arange(256) * 4 * 255 / 1023)]),
    "12 bits": (tiff_of_12_bits(b"\x80\x0f\xff\0", 2), [[128, 255]]),
    **{f"16 bits, {suffix}": (saved(RAMP.astype(np.uint16) * 257, suffix), RAMP) for suffix in ("png", "tif", "ppm")},
    "16 bits, jp2": (saved(RAMP.astype(np.uint16) * 257, "jp2", irreversible=False), RAMP),
    "16 bits, white is zero": (saved(RAMP.astype(np.uint16) * 257, "tif", tiffinfo={262: 0}), 255 - RAMP),
    "3 x 16 bits": (png(2, 16, 2, deep(0, 255, 128, 100, 155, 128)), [[[0, 255, 128], [100, 155, 128]]]),
    "floating point": (saved((RAMP / 255).astype(np.float32), "tif"), RAMP),
}


@pytest.mark.parametrize("kind", DEPTHS)
def test_every_bit_depth_is_scaled_to_255(kind):
    source, expected = DEPTHS[kind]
    assert values(source).tolist() == np.asarray(expected).tolist()


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (RAMP.astype(np.float32), r"floating-point numbers from 0 to 255, expected 0 \(black\) to 1 \(white\)"),
        (np.full((4, 4), np.nan, np.float32), "floating-point numbers from nan to nan"),
        (-np.ones((4, 4), np.float32), "floating-point numbers from -1 to -1"),
        (RAMP.astype(np.int32), "32-bit integers, whose white is unknown"),
    ],
)
def test_numbers_whose_white_is_unknown_are_refused(array, words):
    with pytest.raises(ValueError, match=rf"this file cannot be read .*{words}"):
        read_image(saved(array, "tif"))


def palette(*colours, **options):
    picture = Image.fromarray(np.array([range(len(colours))], np.uint8), "P")
    picture.putpalette([level for colour in colours for level in colour])
    return {"picture": picture, **options}


def key(*numbers):
    return b"tRNS", struct.pack(f">{len(numbers)}H", *numbers)


RGBA = np.array([[[255, 0, 0, 255], [0, 255, 0, 0], [0, 0, 0, 128]]], np.uint8)  # red, hidden green, half of black
OVER_WHITE = [[[255, 0, 0], WHITE, [127, 127, 127]]]
PRIMARIES = [255, 0, 0], [0, 255, 0], [0, 0, 255]
TRANSPARENT = {
    "png": (saved(RGBA), OVER_WHITE),
    "webp": (saved(RGBA, "webp", lossless=True, exact=True), OVER_WHITE),
    "tif": (saved(RGBA, "tif"), OVER_WHITE),
    "tga": (saved(RGBA, "tga"), OVER_WHITE),
    "4 x 16 bits": (png(3, 16, 6, deep(*RGBA.ravel().tolist())), OVER_WHITE),
    "grey": (saved(np.array([[[9, 255], [9, 0], [0, 128]]], np.uint8)), [[9, 255, 127]]),
    "grey of 16 bits": (png(3, 16, 4, deep(9, 255, 9, 0, 0, 128)), [[9, 255, 127]]),
    "palette": (saved(**palette(*PRIMARIES, transparency=1)), [[[255, 0, 0], WHITE, [0, 0, 255]]]),
    "palette's shares": (
        saved(**palette(*PRIMARIES, transparency=bytes([255, 0, 128]))), [[[255, 0, 0], WHITE, [127, 127, 255]]],
    ),
    "gif": (saved(**palette(*PRIMARIES, suffix="gif", transparency=1)), [[[255, 0, 0], WHITE, [0, 0, 255]]]),
    "one value of 1 bit": (png(8, 1, 0, [0b01010101], key(0)), [[255] * 8]),
    "one value of 4 bits": (png(2, 4, 0, [0x34], key(3)), [[255, 4 * 17]]),
    "one value of 8 bits": (png(2, 8, 0, [7, 8], key(7)), [[255, 8]]),
    "one value of 16 bits": (png(2, 16, 0, deep(1, 2), key(257)), [[255, 2]]),
    "one colour of 8 bits": (png(2, 8, 2, [1, 2, 3, 1, 2, 4], key(1, 2, 3)), [[WHITE, [1, 2, 4]]]),
    "one colour of 16 bits": (png(2, 16, 2, deep(1, 2, 3, 1, 2, 4), key(257, 514, 771)), [[WHITE, [1, 2, 4]]]),
    "grey palette": (saved(**palette([5, 5, 5], [90, 90, 90])), [[5, 90]]),
    "nearly grey palette": (saved(**palette([5, 5, 5], [90, 90, 91])), [[[5, 5, 5], [90, 90, 91]]]),
}  # fmt: skip


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparency_lies_over_white_and_greys_are_grey(kind):
    source, expected = TRANSPARENT[kind]
    assert values(source).tolist() == expected


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
    assert image_size(file) == (96, 48)


def test_damaged_metadata_does_not_cost_the_picture():
    for damage in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"):
        assert values(saved(RAMP, "jpg", exif=damage, quality=95)).shape == RAMP.shape


@pytest.mark.parametrize("suffix", ["jpg", "tif"])  # Pillow writes the JPEG inverted, as Adobe does
def test_cmyk_is_read_as_colours(suffix):
    ink = np.zeros((16, 32, 4), np.uint8)
    ink[:, :16, 0] = 255  # cyan
    ink[:, 16:, 3] = 255  # black
    picture = values(saved(Image.fromarray(ink, "CMYK"), suffix)).astype(int)
    assert np.abs(picture[8, 8] - [0, 255, 255]).max() <= 3
    assert np.abs(picture[8, 24] - [0, 0, 0]).max() <= 3


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif", "mpo"])
def test_of_an_animation_the_first_frame_is_read_and_said(suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    file = saved(frames[0], suffix, save_all=True, append_images=frames[1:], **options)
    assert len(list(ImageSequence.Iterator(Image.open(file)))) == 3
    file.seek(0)
    picture = read_image(file)
    assert np.abs(np.asarray(picture)[4, 4].astype(int) - [255, 0, 0]).max() <= (2 if suffix == "mpo" else 0)
    assert picture.info == ({} if suffix == "mpo" else {"animated": True})  # a telephone's views of one moment
    assert read_image(saved(frames[0], "png")).info == {}


def test_large_pictures_are_refused_by_their_headers_or_decoded_at_a_fraction():
    head = saved(np.zeros((1, 1), np.uint8)).getvalue()
    size = struct.pack(">II", 2**20, 2**7)  # 134 million pixels are promised
    bomb = head[:16] + size + head[24:29] + struct.pack(">I", zlib.crc32(head[12:16] + size + head[24:29])) + head[33:]
    with pytest.raises(ValueError, match="1048576x128 pixels, expected at most 25,000,000"):
        read_image(io.BytesIO(bomb), most_pixels=25_000_000)
    large = Image.new("L", (800, 400), 90)
    assert read_image(saved(large, "jpg"), draft=100).size == (200, 100)
    assert read_image(saved(large, "jpg")).size == read_image(saved(large, "png"), draft=100).size == (800, 400)


def test_what_is_no_image_is_named_in_one_line(tmp_path):
    noise = saved(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).getvalue()
    for name, content in {
        "text.png": b"not a picture", "empty.jpg": b"", "half.png": noise[:2000], "new\nline.png": b"",
        "eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot be read as an image \(.*\): mend or remove it$") as caught:
            read_image(tmp_path / name)
        assert len(str(caught.value).splitlines()) == 1
        assert printable(name) in str(caught.value)
    with pytest.raises(ValueError, match="format"):
        read_image(saved(RAMP, "tif"), formats=("PNG", "JPEG"))
    assert printable("naïve 猫") == "naïve 猫"
    assert printable("caf\udce9\n.png") == "caf\\xe9\\n.png"
    assert {".png", ".jpg", ".jfif", ".webp", ".gif", ".tif", ".pgm", ".tga", ".mpo"} <= readable_suffixes()
    assert not {".pdf", ".mpg", ".eps", ".h5", ".wmf", ".txt"} & readable_suffixes()


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tif", "webp", "bmp", "jp2", "ppm", "tga", "ico", "psd"])
def test_bytes_of_any_kind_are_an_image_or_one_line(suffix):
    """Flipped, lost and doubled bytes: nothing but a picture or a ValueError of one line comes of them."""
    if suffix == "psd":  # which Pillow does not write: a header, and too little behind it
        whole = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 16, 16, 8, 3) + bytes(12) + b"\0\0" + bytes(700)
    else:
        whole = saved(COLOURS, suffix).getvalue()
    rng = np.random.default_rng(0)
    for _ in range(150):
        content = bytearray(whole)
        for place in rng.integers(0, len(whole), rng.integers(1, 6)):
            content[place] = rng.integers(0, 256)
        cut = int(rng.integers(0, len(content)))
        changed = (content, content[:cut], content[:cut] + content[cut // 2 :])[rng.integers(0, 3)]
        try:
            assert read_image(io.BytesIO(bytes(changed)), most_pixels=1_000_000).mode in ("L", "RGB")
        except ValueError as error:
            assert re.fullmatch(r"this file cannot be read as an image \(.*", str(error))  # noqa: PT017


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
