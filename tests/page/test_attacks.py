"""Files of strangers who mean harm: what each of them meets, exactly."""

import base64
import dataclasses
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from marval.config import LatentSpace
from marval.io.checkpoint import WEIGHTS, load_model, model_hash, save_model
from marval.model import MAR
from marval.pipeline import load
from marval.recipe import KEY, make_recipe
from marval.runtime.rng import generator
from tiny import tiny_config, tiny_model
from uploads import chunk, content, png_of

HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, tiny_model(), tiny_config())
    return folder


@pytest.fixture(scope="module")
def commands():
    """A process that runs marval's commands; see commands_run.py."""
    script = HELPERS / "commands_run.py"
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip
    yield process
    process.stdin.close()
    process.wait(timeout=30)


@pytest.fixture
def command(commands, tmp_path):
    """Runs marval in an empty folder: its exit code and what it said on standard error."""

    def run(*arguments, offline=False):
        print(json.dumps([str(tmp_path), list(map(str, arguments)), offline]), file=commands.stdin, flush=True)
        return json.loads(commands.stdout.readline())

    return run


def one_line(result, *words):
    code, told = result
    assert code == 2, told
    assert len(told.splitlines()) == 1, told
    assert len(told) < 1000
    for word in words:
        assert word in told, told
    return True


# Recipes in pictures


def like(command, tmp_path, text, *given, size=(8, 8)):
    notes = PngInfo()
    notes.add_itxt(KEY, text if isinstance(text, str) else json.dumps(text))
    Image.new("L", size).save(tmp_path / "a.png", pnginfo=notes)
    return command("sample", *given, "--like", "a.png", "--device", "cpu")


@pytest.fixture
def recipe(folder):
    """A sound recipe of the tiny teacher, as JSON."""
    return json.loads(make_recipe("mine", model_hash(folder), load(folder), 0, 5, 4).to_json())


@pytest.mark.parametrize(
    "name", ["/dev/zero", "/etc", "fifo", "//host/share", "\\\\host\\share", "..", "mine", "", "~"]
)
def test_a_path_in_a_picture_is_never_opened(command, tmp_path, folder, recipe, name):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "mine").symlink_to(folder)  # even where it is sound
    assert one_line(like(command, tmp_path, {**recipe, "model": name}), "which is no bundled model", "MODEL --like")
    assert not (tmp_path / "samples").exists()


def test_a_folder_with_a_bundled_models_name_is_not_taken_for_it(command, tmp_path, folder, recipe):
    (tmp_path / "fashion-student").symlink_to(folder)
    told = like(command, tmp_path, {**recipe, "model": "fashion-student"})
    assert one_line(told, "fashion-student has other weights")


def nested(depth):
    return '{"before":' * depth + "{}" + "}" * depth


MALFORMED = [
    ({"batch": [[0, 1e999]], "row": 0}, "batch ((0, inf),)"),
    ({"batch": [[0, 5]] * 100_000}, "a batch of 100000 pictures: expected at most 1024"),
    ({"batch": [[0, 5]] * 2000}, "a batch of 2000 pictures"),
    ({"batch": 7}, "not a recipe"),
    ({"batch": [7]}, "not a recipe"),
    ({"batch": {"a": 1}}, "batch"),
    ({"seed": 10**30}, "seed 1000000"),
    ({"seed": 1.5}, "seed 1.5"),
    ({"K": 10**9}, "1000000000 iterations for 16 tokens"),
    ({"K": -1}, "-1 iterations"),
    ({"K": True}, "iterations True"),
    ({"T": 10**9}, "1000000000"),
    ({"w": float("nan")}, "guidance nan"),
    ({"w": 1e999}, "guidance inf"),
    ({"w": 10**400}, "guidance 1000000"),
    ({"temperature": -1}, "temperature -1"),
    ({"label": -1}, "-1"),
    ({"label": 10**15}, "1000000000000000"),
    ({"order": ["random"]}, "order ['random']"),
    ({"order": "spiral"}, "order 'spiral'"),
    ({"class": None}, "class_name None"),
    ({"model": 3}, "model 3"),
    ({"weights": [1]}, "weights [1]"),
    ({"redrawn": ["0"], "upload": "a"}, "redrawn ('0',)"),
    ({"redrawn": [10**9], "upload": base64.b64encode(content(Image.new("L", (8, 8)))).decode()}, "numbered 0 to 15"),
    ({"redrawn": [0], "upload": "not base64"}, "the upload in the recipe is damaged"),
    ({"redrawn": [0], "upload": base64.b64encode(b"hello").decode()}, "the upload in the recipe is damaged"),
    ({"redrawn": [0], "upload": base64.b64encode(png_of(12_000, 12_000)).decode()}, "12000x12000 pixels"),
    ({"redrawn": [0], "upload": base64.b64encode(content(Image.new("L", (7, 8)))).decode()}, "a picture of 7x8"),
    ({"redrawn": [0]}, "an edit needs"),
    ({"before": {"model": "mine"}, "redrawn": [0]}, "not a recipe"),
    ({"before": [1, 2], "redrawn": [0]}, "not a recipe"),
    ({"reward": "os:getcwd"}, "not a recipe"),  # no file may name code
    ("[1]", "not a recipe"),
    ("null", "not a recipe"),
    ('"model"', "not a recipe"),
    ("1" * 5000, "not a recipe"),
    ("", "not a recipe"),
    ("{", "not a recipe"),
    (nested(99), "not a recipe"),
    (nested(500), "501 edits: expected at most 100"),
    (nested(100_000), "not a recipe"),
    ("[" * 100_000, "not a recipe"),
]


@pytest.mark.parametrize(("change", "message"), MALFORMED, ids=range(len(MALFORMED)))
def test_every_malformed_recipe_is_one_line(command, tmp_path, folder, recipe, change, message):
    text = change if isinstance(change, str) else {**recipe, **change}
    assert one_line(like(command, tmp_path, text, folder), "a.png" if message.startswith("not a recipe") else message)


def test_a_batch_that_would_take_all_memory_is_refused(command, tmp_path, folder, recipe):
    space = dataclasses.replace(tiny_config().space, image_size=(128, 128))
    config = dataclasses.replace(
        tiny_config(), space=space, mar=dataclasses.replace(tiny_config().mar, token_grid=(64, 64))
    )
    save_model(tmp_path / "larger", MAR(config.mar).initialize(generator(0)), config)
    wide = {**recipe, "weights": model_hash(tmp_path / "larger"), "T": 1000, "batch": [[0, 5]] * 1000}
    assert one_line(like(command, tmp_path, wide, "larger"), "a batch of 1000 pictures", "more than 1 GiB")


PICTURES = [
    (png_of(100_000, 100_000), "cannot be read as a PNG"),
    (png_of(9000, 9000), "9000x9000 pixels: expected at most 16000000"),
    (png_of(8, 8, chunk(b"zTXt", b"marval\0\0" + zlib.compress(bytes(50_000_000)))), "cannot be read as a PNG"),
    (png_of(8, 8, chunk(b"iTXt", b"marval\0\1\0\0\0" + zlib.compress(bytes(50_000_000)))), "cannot be read as a PNG"),
    (png_of(8, 8, *[chunk(b"tEXt", b"marval\0" + b"a" * 1_000_000)] * 70), "cannot be read as a PNG"),
    (content(Image.new("L", (8, 8)), "GIF"), "cannot be read as a PNG"),
    (b"", "cannot be read as a PNG"),
]


@pytest.mark.parametrize(("picture", "message"), PICTURES, ids=range(len(PICTURES)))
def test_every_malformed_picture_is_one_line(command, tmp_path, picture, message):
    (tmp_path / "a.png").write_bytes(picture)
    assert one_line(command("sample", "--like", "a.png"), "a.png", message)


@pytest.mark.parametrize("kind", ["fifo", "folder", "nothing"])
def test_what_is_no_file_is_not_read(command, tmp_path, kind, folder, recipe):
    if kind == "fifo":
        os.mkfifo(tmp_path / "a.png")
    if kind == "folder":
        (tmp_path / "a.png").mkdir()
    assert one_line(command("sample", "--like", "a.png"), "a.png does not exist, or is no file")
    (tmp_path / "unfinished").mkdir()  # a run's folder in which there is no model yet
    if kind == "fifo":
        os.mkfifo(tmp_path / "unfinished" / WEIGHTS)
        assert one_line(command("sample", "unfinished"), "does not exist, or is no file")
        (tmp_path / "a.png").unlink()
    if kind != "folder":
        assert one_line(like(command, tmp_path, recipe, "unfinished"), "unfinished has no model.safetensors")


# Checkpoints


def forged(folder, tensors=None, **changes):
    """A checkpoint whose configuration says what it likes."""
    values = tiny_config().to_dict()
    for name, value in changes.items():
        part, _, field = name.rpartition("__")
        (values[part] if part else values)[field] = value
    folder.mkdir(exist_ok=True)
    found = tiny_model().state_dict() if tensors is None else tensors
    save_file(found, folder / WEIGHTS, metadata={"format": "pt", "marval": json.dumps(values)})
    return folder


CONFIGS = [
    ({"name": "/tmp/elsewhere"}, r"name (is )?'/tmp/elsewhere': expected a plain name"),
    ({"name": "../elsewhere"}, r"name (is )?'../elsewhere': expected a plain name"),
    ({"name": "..\\elsewhere"}, "expected a plain name"),
    ({"name": ".hidden"}, "expected a plain name"),
    ({"name": "a\nb"}, "expected a plain name"),
    ({"name": "a" * 101}, "expected a plain name"),
    ({"name": 3}, "name (is )?3"),
    ({"data": "folder://host/share"}, "data are 'folder://host/share': expected a place on this machine"),
    ({"data": "\\\\host\\share"}, "expected a place on this machine"),
    ({"reward": "os:getcwd"}, "unexpected keyword argument 'reward'"),  # no file may name code
    ({"mar__encoder_depth": 10**9}, "1000000004 blocks, but 80 tensors"),
    ({"mar__encoder_depth": -1}, "a size below 1|encoder_depth -1: expected"),
    ({"mar__encoder_dim": 10**15}, "no network has the sizes in its configuration"),
    ({"mar__encoder_dim": "16"}, "encoder_dim (is )?'16'"),
    ({"mar__encoder_heads": 0}, "a size below 1|encoder_heads 0: expected"),
    ({"mar__encoder_heads": 3}, r"for \(3, 2\) heads|3 attention heads"),
    ({"mar__num_classes": 10**12}, "2 names for 1000000000000 classes|2 class names: expected 1000000000000"),
    ({"mar__token_grid": [10**9, 10**9]}, "but a network for|the network draws"),
    ({"mar__mlp_ratio": float("nan")}, "mlp_ratio (is )?nan"),
    ({"mar__buffer_size": -1}, "a size below 1|buffer_size -1: expected"),
    ({"space__image_size": [10**9, 10**9]}, "pictures of 1000000000x1000000000 pixels|the network draws"),
    ({"space__image_size": [-8, -8]}, r"a size below 1|image_size \(-8, -8\): expected"),
    ({"space__image_size": 8}, "not a marval model"),
    ({"space__patch": 0}, "a size below 1|patch 0: expected"),
    ({"space__scale": 1e999}, "scale (is )?inf"),
    ({"space__kind": ["pixels"]}, "not a marval model"),
    ({"draw__steps": 10**9}, "1000000000"),
    ({"draw__clip": "yes"}, "clip (is )?'yes'"),
    ({"class_names": ["a"]}, "1 names for 2 classes|1 class names: expected 2"),
    ({"class_names": [1, 2]}, r"class_names (is )?\(1, 2\)"),
    ({"class_names": 7}, "not a marval model"),
    ({"order": "spiral"}, "order (is )?'spiral'"),
]


@pytest.mark.parametrize(("change", "message"), CONFIGS, ids=range(len(CONFIGS)))
def test_every_malformed_checkpoint_is_one_line(command, tmp_path, change, message):
    forged(tmp_path / "model", **change)
    result = command("sample", "model", "--count", 1, "--device", "cpu")
    assert one_line(result)
    assert re.search(message, result[1]), result[1]
    assert {file.name for file in tmp_path.iterdir()} == {"model"}


HEADERS = [
    b"", b"hello", struct.pack("<Q", 2**63) + b"{", struct.pack("<Q", 100) + b"{", struct.pack("<Q", 2) + b"{}",
    struct.pack("<Q", 8) + b'{"a": 1}', struct.pack("<Q", 10**6) + b"[" * 10**6, pickle.dumps({"model": 1}),
]  # fmt: skip


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_every_malformed_weights_file_is_one_line(command, tmp_path, header):
    (tmp_path / WEIGHTS).write_bytes(header)
    assert one_line(command("sample", ".", "--device", "cpu"), WEIGHTS)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "null", "3", '"a"', "1" * 5000, '{"space": {}}', ""])
def test_a_configuration_that_is_none_is_one_line(command, tmp_path, text):
    save_file({"a": torch.zeros(1)}, tmp_path / WEIGHTS, metadata={"marval": text})
    assert one_line(command("sample", ".", "--device", "cpu"), WEIGHTS)


def latents(vae):
    """The tiny model on latents: 16 tokens of 4 channels."""
    space = LatentSpace((8, 8), vae, vae_stride=2, latent_channels=4)
    draw = dataclasses.replace(tiny_config().draw, clip=False)
    return dataclasses.replace(tiny_config(), space=space, draw=draw)


@pytest.mark.parametrize(
    ("vae", "message"),
    [
        ("stranger/vae", "nothing is fetched that a file names: hf download stranger/vae"),
        ("//host/share", "is no folder here, nor a hub id"),
        ("\\\\host\\share", "is no folder here, nor a hub id"),
        ("/\\host/share", "is no folder here, nor a hub id"),
        ("/dev/zero", "is no folder here, nor a hub id"),
        ("https://example.com/vae", "is no folder here, nor a hub id"),
        ("", "cannot be loaded"),
        ("/dev", "cannot be loaded"),
        ("pickled", "cannot be loaded"),
    ],
)
def test_what_a_model_names_as_its_vae_is_neither_fetched_nor_unpickled(command, tmp_path, vae, message):
    pytest.importorskip("diffusers")

    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harm",)

    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    (tmp_path / "pickled" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Harm()))
    save_model(tmp_path / "model", tiny_model(), latents(vae))
    drawn = command("sample", "model", "--count", 1, "--iterations", 1, "--device", "cpu", offline=True)
    assert one_line(drawn, message)
    assert not (tmp_path / "harm").exists()


def test_a_vae_is_looked_for_beside_its_model(command, tmp_path):
    pytest.importorskip("diffusers")
    from diffusers import AutoencoderKL

    small = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    save_model(tmp_path / "model", tiny_model(), latents("vae"))
    AutoencoderKL(**small, **kinds).save_pretrained(tmp_path / "model" / "vae")
    (tmp_path / "vae").mkdir()  # another of that name, in the current folder, is not taken
    (tmp_path / "vae" / "config.json").write_text("damaged")
    assert command("sample", "model", "--count", 1, "--iterations", 1, "--device", "cpu") == [0, ""]
    assert Image.open(next((tmp_path / "samples").glob("0*.png"))).size == (8, 8)
    assert load_model(tmp_path / "model")[1].space.vae == "vae"  # as the file says


def test_a_class_cannot_name_another_folder(command, tmp_path):
    names = ["../../elsewhere", "..\\a\nb" + "c" * 300]
    forged(tmp_path / "model", class_names=names)
    assert command("sample", "model", "--count", 2, "--iterations", 1, "--device", "cpu") == [0, ""]
    found = sorted(file.name for file in (tmp_path / "samples").iterdir())
    assert found == ["00000-..-..-elsewhere-0.png", f"00001-..-a-b{'c' * 34}-1.png", "grid.png"]
