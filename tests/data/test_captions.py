"""Captions: what tables and text files say, which images they leave out, and how one of several is drawn."""

import dataclasses

import pytest
import torch
from PIL import Image

from marval.classes import label_names, labels_in_turn, seen_labels
from marval.data import load_images
from marval.data.captions import find_captions
from marval.data.load import check_data
from marval.data.loader import Loader
from marval.io.text import ENCODER
from marval.presets import TrainConfig, TuneConfig
from marval.runtime.distributed import Workers
from marval.runtime.folder import data_identity
from marval.spaces import token_space
from marval.train.draws import tune_draws
from marval.train.teacher import first_network, teacher_config
from texts import COLOURS, embedding, write_captioned


def pictures(root, *names):
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 8)).save(root / name)


def test_a_tables_images_have_concepts_captions_and_styles(tmp_path, encoder):
    root = write_captioned(tmp_path / "emoji@home")
    train, held_out = (
        load_images(f"folder:{root}", encoder=ENCODER),
        load_images(f"folder:{root}@held-out", encoder=ENCODER),
    )
    assert train.class_names == held_out.class_names == tuple(COLOURS)
    assert (train.labels.tolist(), held_out.labels.tolist()) == ([0, 0, 1, 1, 2], [2])
    assert train.captions.styles == ("3d", "flat")
    assert (train.captions.style.tolist(), held_out.captions.style.tolist()) == ([0, 1, 0, 1, 0], [1])
    drawn = torch.cat([held_out.conditions(torch.tensor([0] * 90), torch.arange(90))])
    said = [held_out.captions.texts[row] for row in held_out.captions.rows]
    assert said == ["a red apple", "red thing", "apple"]
    counts = [int(torch.isclose(drawn[:, :8], embedding(text), atol=1e-3).all(dim=1).sum()) for text in said]
    assert sum(counts) == 90
    assert min(counts) > 15  # each caption about as often
    assert torch.equal(drawn[:, 8:], torch.tensor([[0.0, 1.0]]).expand(90, 2))
    config = teacher_config("t", train, f"folder:{root}")
    assert (config.mar.text_dim, config.mar.num_styles, config.encoder) == (8, 2, ENCODER)
    assert [label_names(config)[label] for label in config.unseen] == ["apple, flat style"]
    train.captions.style[0] = -1  # a picture without a style is of none of them
    unstyled = teacher_config("t", train, f"folder:{root}")
    assert [label_names(config)[label] for label in unstyled.unseen] == ["shark, 3d style", "apple, flat style"]
    train.captions.style[0] = 0
    assert [*seen_labels(config)] == sorted(labels_in_turn(range(5), config)) == [0, 1, 2, 3, 4]
    drawn = tune_draws(TuneConfig(batch_size=500), config, 0)[0]
    assert drawn.unique().tolist() == [0, 1, 2, 3, 4]
    assert load_images(f"folder:{root}").captions is None  # a model of classes reads no captions
    (root / "captions.csv").write_text((root / "captions.csv").read_text().replace("blue thing", "azure thing"))
    assert data_identity(load_images(f"folder:{root}", encoder=ENCODER)) != data_identity(train)


def test_training_may_start_from_a_model_that_knows_other_concepts(tmp_path, encoder):
    root = write_captioned(tmp_path / "emoji")
    small = load_images(f"folder:{root}", encoder=ENCODER)
    first = first_network(teacher_config("t", small, ""), 1, small, None)
    pictures(root, "cat.png")
    with (root / "captions.csv").open("a") as table:
        table.write("\ncat.png,a cat,flat,cat,\n")
    large = load_images(f"folder:{root}", encoder=ENCODER)
    config = teacher_config("t", large, "")
    grown = first_network(config, 2, large, first)
    assert torch.equal(grown.text_emb[0].weight, first.text_emb[0].weight)
    torch.testing.assert_close(grown.vocabulary[3].float(), embedding("cat"), atol=1e-3, rtol=0)
    check_data(small, config)  # what a model of text learns from may have other concepts
    with pytest.raises(ValueError, match="initial model's sizes"):
        first_network(dataclasses.replace(config, mar=dataclasses.replace(config.mar, head_depth=4)), 2, large, first)


def test_every_number_of_processes_draws_the_same_captions(tmp_path, encoder):
    data = load_images(f"folder:{write_captioned(tmp_path / 'emoji')}", encoder=ENCODER)
    space, settings = token_space(teacher_config("t", data, "").space), TrainConfig(batch_size=8)
    one, *two = (Loader(data, settings, space, Workers(i, n)) for i, n in ((0, 1), (0, 2), (1, 2)))
    for update in (0, 1, 7):
        (_, _, whole), *halves = (next(loader(update)) for loader in (one, *two))
        assert torch.equal(whole, torch.cat([given for _, _, given in halves]))
    assert not torch.equal(next(one(0))[2], next(one(1))[2])


def test_other_forms_of_captions_are_read(tmp_path):
    for folder in ("hub", "texts", "classes/cat"):
        pictures(tmp_path / folder, "a.png", "b.png")
    rows = "file_name,text\nb.png,a dog\na.png,a cat\nb.png,one more dog\n"
    (tmp_path / "hub/metadata.csv").write_text(rows, encoding="utf-8-sig")
    hub = find_captions(tmp_path / "hub", ())
    assert hub.concepts == ("a dog", "a cat")
    assert hub.entries[str(tmp_path / "hub/b.png")].captions == ["a dog", "one more dog"]
    files = [str(tmp_path / f"texts/{name}.png") for name in "ab"]
    (tmp_path / "texts/a.txt").write_text("a cat|a  kitten\nfelix\n")
    assert find_captions(tmp_path / "texts", files) is None  # b has no text
    (tmp_path / "texts/b.txt").write_text("a dog")
    assert find_captions(tmp_path / "texts", files).entries[files[0]].captions == ["a cat", "a kitten", "felix"]
    (tmp_path / "hub/metadata.csv").write_text("file_name,label\na.png,3\n")  # no captions
    assert find_captions(tmp_path / "hub", ()) is None
    data = load_images(f"folder:{tmp_path / 'classes'}", encoder=ENCODER)
    assert (data.class_names, data.captions) == (("cat",), None)


@pytest.mark.parametrize(
    ("content", "spec", "message"),
    [
        ("file_name,caption\nc.png,a cat\n", "", r"captions.csv, row 2: no image .*c\.png"),
        ("file_name,caption\na.png, | \n", "", "row 2: no caption; expected one"),
        ("file_name,caption\na.png,a cat, sitting\n", "", "row 2: 3 cells, expected 2; put a caption with commas"),
        ("file_name,caption\n", "", "expected a row for each image"),
        ("file_name,caption\na.png,x\n", "@test", "no images of the split 'test': expected one of train"),
        (b"file_name,caption\na.png,\xff\n", "", "cannot be read as a table"),
        ("name\n", "@test", "has no table of captions"),
    ],
)
def test_bad_tables_are_refused(content, spec, message, tmp_path):
    pictures(tmp_path / "images", "a.png")
    (tmp_path / "images/captions.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        load_images(f"folder:{tmp_path / 'images'}{spec}", encoder=ENCODER)
