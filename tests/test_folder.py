"""People's own images: what of a folder is read, as which class and size, with odd files and few of them."""

import os
import socket

import numpy as np
import pytest
import torch
from PIL import Image

import marval.data.folder as folder_module
from marval.data import load_folder, load_images, parse_size, patch_size, split_data
from marval.data.folder import list_folder, say_once
from marval.data.imagenet import imagenet_classes
from marval.data.reading import in_threads
from marval.data.sizes import cut_to_patches, infer_size
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


def names(found):
    return [(os.path.relpath(file, found.root), label) for file, label in found.files]


def test_hidden_files_and_folders_are_ignored_and_counted(root, capsys):
    picture(root / ".ipynb_checkpoints/x.png")
    picture(root / "cat/.ipynb_checkpoints/0-checkpoint.png")
    picture(root / "dog/._0.png", format="PNG")
    picture(root / "__MACOSX/cat/0.png")
    (root / ".git").mkdir()
    (root / ".DS_Store").write_text("x")
    data = load_folder(root)
    assert data.class_names == ("cat", "dog")
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    said = capsys.readouterr().out.strip()
    assert said.count("\n") == 0
    assert "left out 6 hidden (.DS_Store, .git, .ipynb_checkpoints, ...)" in said


def test_suffixes_of_any_kind_and_case_are_read_and_the_rest_is_named(root, capsys):
    for suffix in ("JPG", "jfif", "ppm", "tga", "webp", "avif", "TIFF", "bmp", "gif", "pcx", "jp2"):
        picture(root / "cat" / f"more.{suffix}")
    picture(root / "cat/wrong.jpg", format="PNG")  # the content counts, not the name
    for name in ("photo.heic", "other.HEIC", "paper.pdf", "notes.txt", "README"):
        (root / "dog" / name).write_bytes(b"x")
    data = load_folder(root)
    assert data.labels.tolist() == [0] * 15 + [1] * 3
    said = capsys.readouterr().out.strip()
    assert said.count("\n") == 0
    assert "2 .heic files (other.HEIC, photo.heic)" in said
    assert "1 .pdf files (paper.pdf)" in said
    assert "1 .txt files (notes.txt)" in said
    assert "1 files without a suffix (README)" in said


def test_links_are_followed_and_loops_end(root, tmp_path, capsys):
    picture(tmp_path / "elsewhere/deep/far.png")
    picture(tmp_path / "elsewhere/near.png")
    (root / "cat/linked").symlink_to(tmp_path / "elsewhere")
    (root / "cat/again").symlink_to(tmp_path / "elsewhere/deep")
    (root / "cat/loop").symlink_to(root / "cat")
    (root / "up").symlink_to(tmp_path)
    (root / "self").symlink_to(root / "self")
    (root / "dog/gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "dog/one.png").symlink_to(tmp_path / "elsewhere/near.png")
    (root / "fox").symlink_to(tmp_path / "elsewhere")  # a class that is a link
    found = list_folder(root)
    assert found.class_names == ("cat", "dog", "fox")
    files = [name for name, _ in names(found)]
    assert [name for name in files if "far" in name] == ["cat/again/far.png", "fox/deep/far.png"]
    assert {"cat/linked/near.png", "dog/one.png"} <= set(files)
    load_folder(root)
    said = capsys.readouterr().out
    assert "1 broken links (gone.png)" in said
    assert "links to folders that were read already (up, deep, loop)" in said


def test_a_pipe_or_socket_is_never_opened(root):
    os.mkfifo(root / "cat/pipe.png")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(root / "dog/socket.png"))
    assert len(load_folder(root)) == 6
    assert list_folder(root).left_out.counts["special files"] == 2


def test_names_of_any_bytes_are_read_and_printed(root, capsys):
    odd = os.fsencode(root / "cat") + b"/caf\xe9 \n\xff.png"
    picture(root / "cat/odd.png")
    os.rename(root / "cat/odd.png", odd)
    os.rename(root / "dog", os.fsencode(root) + b"/d\xf6g")
    with open(os.fsencode(root) + b"/cat/\xfe.txt", "w"):
        pass
    data = load_folder(root)
    assert len(data) == 7
    assert data.class_names == ("cat", "d\\xf6g")
    assert "1 .txt files (\\xfe.txt)" in capsys.readouterr().out
    for file, _ in list_folder(root).files:
        if "caf" in file:
            os.truncate(file, 40)
    assert len(load_folder(root)) == 6
    assert "caf\\xe9 \\n\\xff.png cannot be read" in capsys.readouterr().out


def test_a_folder_without_class_folders_is_one_class(root, capsys, monkeypatch):
    data = load_folder(root / "cat")
    assert data.class_names == ("cat",)
    assert len(data) == 3
    assert "no sub-folders of images: its images, 3, are one class, 'cat'" in capsys.readouterr().out
    monkeypatch.chdir(root / "dog")
    assert load_folder(".").class_names == ("dog",)


def test_pictures_beside_the_folders_of_classes_are_named(root, capsys):
    picture(root / "cover.png")
    assert len(load_folder(root)) == 6
    assert "left out 1 images beside the folders of classes (cover.png)" in capsys.readouterr().out


def test_what_is_no_set_of_images_is_refused(root, tmp_path):
    with pytest.raises(ValueError, match="nothing is not a folder"):
        load_folder(tmp_path / "nothing")
    (root / "empty").mkdir()
    with pytest.raises(ValueError, match="no images in empty"):
        load_folder(root)
    (tmp_path / "bare/a").mkdir(parents=True)
    (tmp_path / "bare/a/x.heic").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"holds no images: .* it holds 1 .heic files \(x.heic\)"):
        load_folder(tmp_path / "bare")
    wordnet, tench = next(iter(imagenet_classes().items()))
    for name in (wordnet, tench):
        picture(tmp_path / "fish" / name / "0.png")
    with pytest.raises(ValueError, match=f"the folders {wordnet} and {tench} are both the class '{tench}'"):
        load_folder(tmp_path / "fish")


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(28, 28)] * 3, (28, 28)),
        ([(36, 36)] * 3, (35, 35)),
        ([(39, 37)] * 3, (35, 35)),
        ([(60, 60)] * 3, (56, 56)),
        ([(63, 63)] * 3, (56, 56)),
        ([(40, 30)] * 3, (30, 40)),
        ([(400, 300), (4000, 3000), (80, 60)], (48, 64)),
        ([(48, 24)], (24, 48)),
        ([(200, 100)] * 6 + [(100, 200)] * 4, (64, 64)),
        ([(200, 200)] * 9 + [(10, 10)], (64, 64)),
        ([(200, 200)] * 2 + [(3, 3)], (64, 64)),
        ([(20, 20)] * 9 + [(3000, 100)], (20, 20)),
        ([(64, 32)] * 19 + [(50, 50)], (32, 64)),
        ([(8, 8)] * 3, (8, 8)),
        ([(1, 1)], (8, 8)),
        ([(5, 40)], (40, 10)),
        ([(1000, 9)], (8, 64)),
    ],
)
def test_sizes_are_inferred_and_can_be_cut(sizes, expected, tmp_path):
    for i, size in enumerate(sizes):
        picture(tmp_path / "a" / f"{i}.png", size)
    data = load_folder(tmp_path)
    assert data.images.shape[2:] == expected
    config = teacher_config("mine", data, "folder:x")
    assert config.space.token_grid[0] * config.space.patch == expected[0]
    assert max(config.space.token_grid) <= 8


def test_exif_counts_for_the_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(3):
        picture(tmp_path / "a" / f"{i}.jpg", (40, 30), exif=exif)
    assert infer_size([str(file) for file in (tmp_path / "a").iterdir()]) == (40, 30)


def test_every_inferred_size_can_be_cut_into_patches():
    for height in range(1, 65):
        for width in range(1, 65):
            rows, columns = cut_to_patches(height, width)
            patch = patch_size(rows, columns)
            assert patch >= 4
            assert rows // patch <= 8
            assert columns // patch <= 8
            assert min(rows, columns) >= 8
            assert max(rows, columns) <= 64
    assert [patch_size(side, side) for side in (8, 20, 28, 32, 64, 256)] == [4, 4, 4, 4, 8, 32]


def test_sizes_are_parsed_and_checked():
    assert parse_size("32") == (32, 32)
    assert parse_size("48x24") == (24, 48)
    assert parse_size("36X36") == (36, 36)
    for text in ("", "x", "12x", "-8", "8.5", "1x2x3", "²", "big"):
        with pytest.raises(ValueError, match="expected a number of pixels such as 32, or WIDTHxHEIGHT"):
            parse_size(text)
    for text in ("0", "7", "2000", "16x4"):
        with pytest.raises(ValueError, match="expected 8 to 1024 pixels a side"):
            parse_size(text)
    with pytest.raises(ValueError, match="expected a --size such as 40x40"):
        parse_size("37")


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
    deep = Image.fromarray(np.full((16, 16), 257 * 7, np.uint16))
    deep.save(tmp_path / "a/3.png")
    data = load_folder(tmp_path)
    assert data.images.shape == (4, 1, 16, 16)
    assert data.images[:, 0, 0, 0].tolist() == [90, 91, 92, 7]
    assert load_folder(tmp_path, channels=3).images.shape == (4, 3, 16, 16)
    picture(tmp_path / "a/4.png", colour="lime")
    data = load_folder(tmp_path)
    assert data.images.shape == (5, 3, 16, 16)
    assert data.images[0].unique().tolist() == [90]
    assert data.images[4, :, 0, 0].tolist() == [0, 255, 0]


def test_animations_are_said_once(root, capsys):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime")]
    frames[0].save(root / "cat/moving.gif", save_all=True, append_images=frames[1:])
    for _ in range(2):
        assert len(load_folder(root)) == 7
    said = capsys.readouterr().out
    assert said.count("1 animations whose first frames are read (moving.gif)") == 1


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
    for i in range(4):
        (root / f"cat/bad-{i}.png").unlink()
    (root / "owl").mkdir()
    (root / "owl/only.png").write_bytes(b"bad")
    with pytest.raises(ValueError, match="no image of owl can be read"):
        load_folder(root)


def test_a_limited_sample_is_balanced_reads_no_more_and_is_the_same_again(tmp_path, monkeypatch):
    for name, count in (("few", 2), ("many", 30), ("some", 8)):
        for i in range(count):
            picture(tmp_path / name / f"{i:02d}.png", colour=(i, 0, 0))
    read = []
    whole = folder_module.read_image
    monkeypatch.setattr(folder_module, "read_image", lambda file: (read.append(file), whole(file))[1])
    data = load_folder(tmp_path, (16, 16), limit=12)
    assert len(read) == 12
    assert data.labels.bincount().tolist() == [2, 5, 5]
    assert torch.equal(load_folder(tmp_path, (16, 16), limit=12).images, data.images)
    assert not torch.equal(load_folder(tmp_path, (16, 16), limit=12, seed=1).images, data.images)
    assert data.class_names == ("few", "many", "some")
    assert len(load_folder(tmp_path, limit=1000)) == 40
    with pytest.raises(ValueError, match="a limit of 0 images: expected at least 1"):
        load_folder(tmp_path, limit=0)
    for name in "abcdefgh":
        picture(tmp_path / name / "0.png")
    assert load_folder(tmp_path, limit=5).labels.bincount().max() == 1  # fewer than classes: one each


def test_images_that_are_still_held_are_not_decoded_again(root, monkeypatch):
    read = []
    whole = folder_module.read_image
    monkeypatch.setattr(folder_module, "read_image", lambda file: (read.append(file), whole(file))[1])
    data = load_folder(root)
    assert load_folder(root, (16, 16)) is data
    assert load_folder(root, (8, 8)) is not data
    assert len(read) == 12
    picture(root / "cat/0.png", colour="lime")
    assert load_folder(root).images[0, :, 0, 0].tolist() == [0, 255, 0]
    del data
    read.clear()
    load_folder(root)
    assert len(read) == 6


def test_large_pictures_do_not_pile_up_in_memory():
    """Threads run at most a few items ahead of what is asked for."""
    started = []
    results = in_threads(lambda i: (started.append(i), i)[1], range(1000), ahead=5)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    assert len(started) <= 8
    results.close()
    assert list(in_threads(str, range(50))) == [str(i) for i in range(50)]


def test_each_class_is_split_and_never_lost(tmp_path):
    for name, count in (("a", 1), ("b", 2), ("c", 30)):
        for i in range(count):
            picture(tmp_path / name / f"{i}.png")
    data = load_folder(tmp_path)
    first, second = split_data(data, seed=0)
    assert first.labels.bincount().tolist() == [1, 1, 27]
    assert second.labels.bincount(minlength=3).tolist() == [0, 1, 3]
    alone = load_folder(tmp_path / "a")
    with pytest.raises(ValueError, match="1 images of 1 classes: none can be held out"):
        split_data(alone, seed=0)


def test_only_the_first_of_several_processes_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    say_once("from the second process")
    assert capsys.readouterr().out == ""


def test_the_teachers_shift_counts_every_image_alike(tmp_path):
    for i in range(1001):
        Image.new("L", (8, 8), 0 if i < 1000 else 255).save(tmp_path / f"{i:04d}.png")
    space = teacher_config("mine", load_folder(tmp_path), "folder:x").space
    assert space.shift == 0.001
    assert space.scale == pytest.approx(1 / 0.032)
