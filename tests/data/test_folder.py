"""People's own images: what of a folder is read, as which class and size, with odd files and few of them."""

import itertools
import os

import numpy as np
import pytest
import torch
from PIL import Image

from marval.data import load_folder, load_images, parse_size, patch_size, split_data
from marval.data.folder import list_folder, say_once
from marval.data.images import cut_to_patches
from marval.io.official import imagenet_classes
from marval.train.teacher import teacher_config


def picture(file, size=(16, 16), colour="red", **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file, **options)


@pytest.fixture
def root(tmp_path):
    """Two classes of three pictures."""
    for name, colour in (("cat", "red"), ("dog", "blue")):
        for i in range(3):
            picture(tmp_path / "mine" / name / f"{i}.png", colour=colour)
    return tmp_path / "mine"


def test_what_is_no_image_of_a_class_is_left_out_and_counted(root, capsys):
    for name in (".ipynb_checkpoints/x.png", "cat/.ipynb_checkpoints/0.png", "__MACOSX/cat/0.png", "cover.png"):
        picture(root / name)
    picture(root / "dog/._0.png", format="PNG")
    for name in ("photo.heic", "other.HEIC", "paper.pdf", "README"):
        (root / "dog" / name).write_bytes(b"x")
    os.mkfifo(root / "cat/pipe.png")  # which would be waited for for ever
    (root / "dog/gone.png").symlink_to(root / "nowhere.png")
    (root / "cat/loop").symlink_to(root / "cat")
    data = load_folder(root)
    assert data.class_names == ("cat", "dog")
    assert data.labels.tolist() == [0] * 3 + [1] * 3
    printed = capsys.readouterr().out
    assert "2 .heic" in printed
    assert "1 images beside the folders of classes" in printed


def test_suffixes_of_any_kind_and_case_are_read(root):
    for suffix in ("JPG", "jfif", "webp", "TIFF"):
        picture(root / "cat" / f"more.{suffix}")
    picture(root / "cat/wrong.jpg", format="PNG")  # the content counts, not the name
    assert load_folder(root).labels.tolist() == [0] * 8 + [1] * 3


def test_links_are_followed(root, tmp_path):
    picture(tmp_path / "elsewhere/deep/far.png")
    picture(tmp_path / "elsewhere/near.png")
    (root / "cat/linked").symlink_to(tmp_path / "elsewhere")
    (root / "dog/one.png").symlink_to(tmp_path / "elsewhere/near.png")
    (root / "fox").symlink_to(tmp_path / "elsewhere")  # a class that is a link
    class_names, files = list_folder(root)
    assert class_names == ("cat", "dog", "fox")
    linked = " ".join(os.path.relpath(file, root) for file, _ in files if os.path.basename(file)[0] not in "012")
    assert linked == "cat/linked/near.png cat/linked/deep/far.png dog/one.png fox/near.png fox/deep/far.png"


def test_names_of_any_bytes_are_read_and_printed(root, capsys):
    os.rename(root / "cat/0.png", odd := os.fsencode(root / "cat") + b"/caf\xe9.png")
    os.rename(root / "dog", os.fsencode(root) + b"/d\xf6g")
    os.truncate(odd, 40)
    assert load_folder(root).class_names == ("cat", "d\\xf6g")
    assert "caf\\xe9.png cannot be read" in capsys.readouterr().out


def test_a_folder_without_class_folders_is_one_class(root, capsys, monkeypatch):
    monkeypatch.chdir(root / "dog")
    assert load_folder(".").class_names == ("dog",)
    assert "no sub-folders of images: its 3 images are one class" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    say_once("from the second process")
    assert capsys.readouterr().out == ""


def test_what_is_no_set_of_images_is_refused(root, tmp_path):
    (root / "empty").mkdir()
    (tmp_path / "bare/a").mkdir(parents=True)
    for name, words in {
        "nothing": "nothing is not a folder",
        "mine": "no images in empty",
        "bare": "holds no images: expected DIR/CLASS/IMAGE.png",
    }.items():
        with pytest.raises(ValueError, match=words):
            load_folder(tmp_path / name)
    for spec in ("cifar", "folder:", "images"):
        with pytest.raises(ValueError, match="unknown data"):
            load_images(spec)


SIZES = [  # (width, height) of the files -> rows, columns
    ([(28, 28)] * 3, (28, 28)), ([(39, 37)] * 3, (35, 35)), ([(63, 63)] * 3, (56, 56)), ([(40, 30)] * 3, (30, 40)),
    ([(1, 1)], (8, 8)), ([(1000, 9)], (8, 64)), ([(400, 300), (4000, 3000), (80, 60)], (48, 64)),
    ([(200, 100)] * 6 + [(100, 200)] * 4, (64, 64)), ([(20, 20)] * 9 + [(10, 10)], (20, 20)),
    ([(20, 20)] * 9 + [(3000, 100)], (20, 20)), ([(64, 32)] * 19 + [(50, 50)], (32, 64)),
]  # fmt: skip


@pytest.mark.parametrize(("sizes", "expected"), SIZES)
def test_sizes_are_inferred_and_can_be_cut(sizes, expected, tmp_path):
    for i, size in enumerate(sizes):
        picture(tmp_path / "a" / f"{i}.png", size)
    data = load_folder(tmp_path)
    assert data.images.shape[2:] == expected
    config = teacher_config("mine", data, "folder:x")
    assert config.space.token_grid[0] * config.space.patch == expected[0]
    assert max(config.space.token_grid) <= 8


def test_every_inferred_size_can_be_cut_into_patches():
    for height, width in itertools.product(range(1, 65), repeat=2):
        sides = cut_to_patches(height, width)
        patch = patch_size(*sides)
        assert 4 <= patch <= min(sides)
        assert max(sides) // patch <= 8 <= min(sides)
        assert max(sides) <= 64


def test_sizes_are_parsed_and_checked():
    assert [patch_size(side, side) for side in (8, 20, 28, 32, 64, 256)] == [4, 4, 4, 4, 8, 32]
    assert [parse_size(text) for text in ("32", "48x24", "36X36")] == [(32, 32), (24, 48), (36, 36)]
    for texts, words in {
        ("", "x", "12x", "-8", "8.5", "1x2x3", "²", "big"): "expected a number of pixels such as 32, or WIDTHxHEIGHT",
        ("0", "7", "2000", "16x4"): "expected 8 to 1024 pixels a side",
        ("37",): "expected a --size such as 40x40",
    }.items():
        for text in texts:
            with pytest.raises(ValueError, match=words):
                parse_size(text)


def test_images_are_scaled_to_cover_the_size_and_cropped(tmp_path):
    array = np.zeros((100, 300, 3), np.uint8)
    array[:, 100:200] = 255  # the middle third
    (tmp_path / "a").mkdir()
    Image.fromarray(array).save(tmp_path / "a/wide.png")
    data = load_images(f"folder:{tmp_path}", size=(20, 20))
    assert data.images.shape == (1, 3, 20, 20)
    assert data.images[..., 2:-2].min() == 255
    assert data.images.min() > 200
    assert load_images(f"folder:{tmp_path}", size=(10, 30)).images[0, 0, :, 0].max() == 0


def test_grey_stays_grey_until_one_is_in_colour(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(3):
        Image.fromarray(np.full((16, 16), 90 + i, np.uint8)).save(tmp_path / f"a/{i}.png")
    Image.fromarray(np.full((16, 16), 257 * 7, np.uint16)).save(tmp_path / "a/3.png")
    data = load_folder(tmp_path)
    assert data.images.shape == (4, 1, 16, 16)
    assert data.images[:, 0, 0, 0].tolist() == [90, 91, 92, 7]
    assert load_folder(tmp_path, channels=3).images.shape == (4, 3, 16, 16)
    picture(tmp_path / "a/4.png", colour="lime")
    data = load_folder(tmp_path)
    assert data.images[0].unique().tolist() == [90]
    assert data.images[4, :, 0, 0].tolist() == [0, 255, 0]


def test_a_few_damaged_images_are_left_out_and_more_are_refused(root, capsys):
    for i in range(4):
        assert load_folder(root).labels.tolist() == [0] * 3 + [1] * 3
        (root / f"cat/bad-{i}.png").write_bytes(b"bad")
    assert "left out 3 that cannot be read, such as: " in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"cat/bad-\d.png cannot be read as an image \(of no known format\).*3 others"):
        load_folder(root)
    for i in range(400):
        picture(root / "dog" / f"more-{i}.png")
    assert load_folder(root).labels.tolist() == [0] * 3 + [1] * 403  # one in a hundred


def test_a_limited_sample_is_balanced_and_the_same_again(tmp_path):
    for name, count in (("few", 2), ("many", 30), ("some", 8)):
        for i in range(count):
            picture(tmp_path / name / f"{i:02d}.png", colour=(i, 0, 0))
    data, again = (load_folder(tmp_path, (16, 16), limit=12) for _ in range(2))
    assert data.labels.bincount().tolist() == [2, 5, 5]
    assert torch.equal(data.images, again.images)
    assert len(load_folder(tmp_path, limit=1000)) == 40
    assert load_folder(tmp_path, limit=2).labels.bincount().max() == 1  # fewer than classes: one each


def test_each_class_is_split_and_never_lost(tmp_path):
    for name, count in (("a", 1), ("b", 2), ("c", 30)):
        for i in range(count):
            picture(tmp_path / name / f"{i}.png")
    first, second = split_data(load_folder(tmp_path), seed=0)
    assert first.labels.bincount().tolist() == [1, 1, 27]
    assert second.labels.bincount(minlength=3).tolist() == [0, 1, 3]
    with pytest.raises(ValueError, match="1 images of 1 classes: none can be held out"):
        split_data(load_folder(tmp_path / "a"), seed=0)


def test_imagenet_has_a_thousand_names_of_its_own(tmp_path):
    names = imagenet_classes()
    assert len(names) == len(set(names.values())) == 1000
    assert list(names) == sorted(names)
    expected = ["tench", "golden retriever", "tabby", "toilet tissue"]
    assert [list(names.values())[i] for i in (0, 207, 281, 999)] == expected
    for name in ("n02012849", "pear"):
        picture(tmp_path / name / "0.png")
    assert load_folder(tmp_path).class_names == ("crane bird", "pear")


def test_the_teachers_shift_counts_every_image_alike(tmp_path):
    for i in range(1001):
        Image.new("L", (8, 8), 0 if i < 1000 else 255).save(tmp_path / f"{i:04d}.png")
    space = teacher_config("mine", load_folder(tmp_path), "folder:x").space
    assert (space.shift, space.scale) == (0.001, pytest.approx(1 / 0.032))
