"""The one reader of image files: upright, over white, 8 bits, from whatever people's cameras and tools write."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageSequence

from marval.io.images import image_size, printable, read_image, readable_suffixes

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.stack([RAMP, RAMP.T, 255 - RAMP], axis=2)


def saved(picture, suffix="png", **options):
    buffer = io.BytesIO()
    picture.save(buffer, format={"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()), **options)
    buffer.seek(0)
    return buffer


def values(source):
    picture = read_image(source)
    assert picture.mode in ("L", "RGB")
    return np.asarray(picture)


def png(width, height, bits, colour, rows, *chunks):
    """A PNG by hand, in the bit depths that Pillow does not write."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*c) for c in chunks) + data + chunk(b"IEND", b""))


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "tif", "ppm", "tga", "webp", "avif", "ico", "pcx"])
def test_grey_and_colour_come_as_they_are(suffix):
    lossless = {"lossless": True} if suffix == "webp" else {"quality": 100} if suffix == "avif" else {}
    found = values(saved(Image.fromarray(COLOURS), suffix, **lossless)).astype(int)
    if suffix != "gif":  # 256 colours of its own choice
        assert found.shape == COLOURS.shape
        assert np.abs(found - COLOURS).max() <= (20 if suffix == "avif" else 0)
    if suffix not in ("webp", "avif", "ico"):  # these know no grey
        assert (values(saved(Image.fromarray(RAMP), suffix)) == RAMP).all()


def test_every_bit_depth_is_scaled_to_255():
    assert values(png(4, 1, 2, 0, [bytes([0b00011011])])).tolist() == [[0, 85, 170, 255]]
    assert values(png(2, 1, 4, 0, [bytes([0x0F])])).tolist() == [[0, 255]]
    assert values(saved(Image.fromarray(RAMP > 99), "png")).tolist() == np.where(RAMP > 99, 255, 0).tolist()
    deep = RAMP.astype(np.uint16) * 257  # 0 to 65535
    for suffix in ("png", "tif", "ppm", "jp2"):
        options = {"irreversible": False} if suffix == "jp2" else {}
        found = values(saved(Image.fromarray(deep), "jpeg2000" if suffix == "jp2" else suffix, **options))
        assert (found == RAMP).all(), suffix
    row = b"".join(struct.pack(">HHH", 257 * i, 65535 - 257 * i, 128 * 257) for i in (0, 100, 255))
    assert values(png(3, 1, 16, 2, [row])).tolist() == [[[0, 255, 128], [100, 155, 128], [255, 0, 128]]]
    assert (values(io.BytesIO(b"P5 256 1 1023\n" + b"".join(struct.pack(">H", 4 * i) for i in range(256)))) ==
            np.round(np.arange(256) * 4 * 255 / 1023)).all()  # fmt: skip


def test_tiffs_of_12_bits_and_with_white_as_zero():
    assert (values(saved(Image.fromarray(RAMP.astype(np.uint16) * 257), "tif", tiffinfo={262: 0})) == 255 - RAMP).all()
    picture = Image.open(saved(Image.fromarray(RAMP.astype(np.uint16) * 16), "tif"))
    picture.tag_v2[258] = (12,)
    from marval.io.images import levels

    picture.load()
    assert levels(picture, np.array([[0, 2048, 4095]])).tolist() == [[0, 128, 255]]


def test_floating_point_from_black_to_white_is_read_and_all_else_is_refused():
    assert (values(saved(Image.fromarray((RAMP / 255).astype(np.float32)), "tif")) == RAMP).all()
    for array in (RAMP.astype(np.float32), np.full((4, 4), np.nan, np.float32), -np.ones((4, 4), np.float32)):
        with pytest.raises(ValueError, match=r"floating-point numbers .* expected 0 \(black\) to 1 \(white\)"):
            read_image(saved(Image.fromarray(array), "tif"))


def test_integers_of_32_bits_are_refused_by_name(tmp_path):
    Image.fromarray(RAMP.astype(np.int32)).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match=r"deep.tif cannot be read .*32-bit integers, whose white is unknown"):
        read_image(tmp_path / "deep.tif")


def test_transparency_lies_over_white():
    rgba = np.zeros((1, 3, 4), np.uint8)  # red, hidden green, half of black
    rgba[0] = [[255, 0, 0, 255], [0, 255, 0, 0], [0, 0, 0, 128]]
    expected = [[[255, 0, 0], [255, 255, 255], [127, 127, 127]]]
    for suffix in ("png", "webp", "tif", "tga"):
        options = {"lossless": True, "exact": True} if suffix == "webp" else {}
        assert values(saved(Image.fromarray(rgba), suffix, **options)).tolist() == expected, suffix
    grey = Image.fromarray(np.array([[[9, 255], [9, 0], [0, 128]]], np.uint8))
    assert values(saved(grey)).tolist() == [[9, 255, 127]]
    deep_grey = b"".join(struct.pack(">HH", level * 257, alpha * 257) for level, alpha in ((9, 255), (9, 0), (0, 128)))
    assert values(png(3, 1, 16, 4, [deep_grey])).tolist() == [[9, 255, 127]]
    deep = b"".join(struct.pack(">HHHH", *(int(c) * 257 for c in pixel)) for pixel in rgba[0])
    assert values(png(3, 1, 16, 6, [deep])).tolist() == expected
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    assert values(saved(palette, transparency=1)).tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]
    assert values(saved(palette, transparency=bytes([255, 0, 128]))).tolist() == [
        [[255, 0, 0], [255, 255, 255], [127, 127, 255]]
    ]
    assert values(saved(palette, "gif", transparency=1)).tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]


def test_one_value_that_stands_for_transparent_lies_over_white_too():
    def key(*numbers):
        return b"tRNS", struct.pack(f">{len(numbers)}H", *numbers)

    assert values(png(2, 1, 8, 0, [bytes([7, 8])], key(7))).tolist() == [[255, 8]]
    assert values(png(2, 1, 4, 0, [bytes([0x34])], key(3))).tolist() == [[255, 4 * 17]]
    assert values(png(8, 1, 1, 0, [bytes([0b01010101])], key(0))).tolist() == [[255] * 8]
    assert values(png(2, 1, 16, 0, [struct.pack(">HH", 257, 514)], key(257))).tolist() == [[255, 2]]
    assert values(png(2, 1, 8, 2, [bytes([1, 2, 3, 1, 2, 4])], key(1, 2, 3))).tolist() == [[[255] * 3, [1, 2, 4]]]
    row = struct.pack(">6H", *(257 * i for i in (1, 2, 3, 1, 2, 4)))
    assert values(png(2, 1, 16, 2, [row], key(257, 514, 771))).tolist() == [[[255] * 3, [1, 2, 4]]]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
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
    found = np.asarray(read_image(file).convert("L")).astype(int)
    assert found.shape == meant.shape
    assert np.abs(found - meant).mean() < 2
    assert image_size(file) == (96, 48)


def test_damaged_metadata_does_not_cost_the_picture():
    for damage in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"):
        assert values(saved(Image.fromarray(RAMP), "jpg", exif=damage, quality=95)).shape == RAMP.shape


def test_cmyk_is_read_as_colours():
    ink = np.zeros((16, 32, 4), np.uint8)
    ink[:, :16, 0] = 255  # cyan
    ink[:, 16:, 3] = 255  # black
    picture = Image.fromarray(ink, "CMYK")
    for suffix in ("jpg", "tif"):  # Pillow writes the JPEG inverted, as Adobe does
        found = values(saved(picture, suffix)).astype(int)
        assert np.abs(found[8, 8] - [0, 255, 255]).max() <= 3
        assert np.abs(found[8, 24] - [0, 0, 0]).max() <= 3


def test_palettes_of_greys_are_grey():
    picture = Image.fromarray(np.array([[0, 1, 1]], np.uint8), "P")
    picture.putpalette([5, 5, 5, 90, 90, 90])
    assert values(saved(picture)).tolist() == [[5, 90, 90]]
    picture.putpalette([5, 5, 5, 90, 90, 91])
    assert values(saved(picture)).tolist() == [[[5, 5, 5], [90, 90, 91], [90, 90, 91]]]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_of_an_animation_the_first_frame_is_read_and_said(suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    file = saved(frames[0], suffix, save_all=True, append_images=frames[1:], **options)
    assert len(list(ImageSequence.Iterator(Image.open(file)))) == 3
    file.seek(0)
    found = read_image(file)
    assert np.asarray(found)[4, 4].tolist() == [255, 0, 0]
    assert found.info == {"animated": True}
    assert read_image(saved(frames[0], suffix)).info == {}


def test_a_telephones_picture_of_one_moment_is_no_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime")]
    found = read_image(saved(frames[0], "mpo", save_all=True, append_images=frames[1:]))
    assert np.abs(np.asarray(found)[4, 4].astype(int) - [255, 0, 0]).max() <= 2
    assert found.info == {}


def test_too_many_pixels_are_refused_by_the_header():
    row = bytes(2**20 // 8)
    bomb = png(2**20, 2**7, 1, 0, [row] * 4)  # 134 million pixels are promised
    with pytest.raises(ValueError, match="1048576x128 pixels, expected at most 25,000,000"):
        read_image(bomb, most_pixels=25_000_000)


def test_a_large_jpeg_can_be_decoded_at_a_fraction_of_its_size():
    large = Image.new("L", (800, 400), 90)
    assert read_image(saved(large, "jpg"), draft=100).size == (200, 100)
    assert read_image(saved(large, "jpg")).size == (800, 400)
    assert read_image(saved(large, "png"), draft=100).size == (800, 400)


def test_what_is_no_image_is_named_in_one_line(tmp_path):
    whole = saved(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), "png").getvalue()
    for name, content in {
        "text.png": b"not a picture", "empty.jpg": b"", "half.png": whole[:2000], "new\nline.png": b"",
        "eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot be read as an image \(.*\): mend or remove it$") as caught:
            read_image(tmp_path / name)
        assert len(str(caught.value).splitlines()) == 1
        assert printable(name) in str(caught.value)
    with pytest.raises(ValueError, match=r"^this file cannot be read as an image \(of no known format\)"):
        read_image(io.BytesIO(b"text"))
    with pytest.raises(ValueError, match="format"):
        read_image(saved(Image.fromarray(RAMP), "tif"), formats=("PNG", "JPEG"))


def test_names_of_any_bytes_can_be_printed():
    assert printable("naïve 猫") == "naïve 猫"
    assert printable("caf\udce9\n.png") == "caf\\xe9\\n.png"
    printable("\udcff").encode()


def test_every_suffix_that_pillow_reads_is_read_and_no_document():
    known = readable_suffixes()
    assert {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".ppm", ".pgm", ".tga", ".mpo"} <= known
    assert not {".pdf", ".mpg", ".eps", ".ps", ".h5", ".wmf", ".txt", ".json"} & known


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tif", "webp", "bmp", "jpeg2000", "ppm", "tga", "ico", "psd"])
def test_bytes_of_any_kind_are_an_image_or_one_line(suffix):
    """Flipped, lost and doubled bytes: nothing but a picture or a ValueError of one line comes of them."""
    if suffix == "psd":  # which Pillow does not write: a header, and too little behind it
        whole = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 16, 16, 8, 3) + bytes(12) + b"\0\0" + bytes(700)
    else:
        whole = saved(Image.fromarray(COLOURS), suffix).getvalue()
    rng = np.random.default_rng(0)
    for _ in range(150):
        content = bytearray(whole)
        for place in rng.integers(0, len(whole), rng.integers(1, 6)):
            content[place] = rng.integers(0, 256)
        cut = int(rng.integers(0, len(content)))
        changed = (content, content[:cut], content[:cut] + content[cut // 2 :])[rng.integers(0, 3)]
        try:
            assert read_image(io.BytesIO(bytes(changed)), most_pixels=1_000_000).mode in ("L", "RGB")
            said = ""
        except ValueError as error:
            said = str(error)
        assert not said or said.startswith("this file cannot be read as an image (")
        assert "\n" not in said
