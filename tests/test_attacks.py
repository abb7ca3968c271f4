"""Files and requests of strangers who mean harm: what each of them meets, exactly."""

import base64
import concurrent.futures
import dataclasses
import datetime
import io
import json
import os
import pickle
import re
import socket
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import httpx
import pytest
import torch
from gradio_client import Client
from PIL import Image, PngImagePlugin
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

import marval.page.studio as studio_module
from marval.cli import main
from marval.config import LatentSpace
from marval.io.checkpoint import WEIGHTS, load_model, model_hash, save_model
from marval.page import shares, uploads
from marval.page.actions import Desk
from marval.page.app import build
from marval.page.guard import BROKEN, Guard
from marval.page.studio import Picture, Studio
from marval.page.uploads import read_upload
from marval.pipeline import Pipeline, load
from marval.recipe import KEY, make_recipe
from serving import free_port, serving
from test_forged import Forger
from tiny import tiny_config, tiny_model

SOURCE = Path(__file__).parents[1] / "src" / "marval"


def content(picture, format="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, format=format, **options)
    return buffer.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(width, height, *chunks):
    """A PNG that says it has this size, with nearly nothing inside."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    rest = (*chunks, chunk(b"IDAT", zlib.compress(bytes(1000))), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(rest)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, tiny_model(), tiny_config())
    return folder


@pytest.fixture(scope="module")
def studio(folder):
    return Studio.open([str(folder)], "cpu")


@pytest.fixture(scope="module")
def commands():
    """A process that runs marval's commands; see commands_run.py."""
    script = Path(__file__).parent / "helpers" / "commands_run.py"
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


# S1: memory by uploads


def test_a_large_png_is_refused_by_its_header(monkeypatch):
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("it was unpacked"))
    with pytest.raises(ValueError, match="5000x5000 pixels: expected at most 4 million"):
        read_upload(png_of(5000, 5000), 28)
    with pytest.raises(ValueError, match="5000x5000 pixels: expected at most 16 million"):
        read_upload(png_of(5000, 5000), 1024)
    with pytest.raises(ValueError, match="6000x6000 pixels: expected at most 25 million"):
        read_upload(content(Image.new("L", (6000, 6000)), "JPEG"), 28)


def test_a_photograph_is_decoded_at_a_part_of_its_size_and_upright():
    photo = Image.linear_gradient("L").resize((4800, 3200)).convert("RGB")  # dark above, bright below
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    found = read_upload(content(photo, "JPEG", exif=exif), 28)
    assert found.size == (600, 400)
    assert found.getpixel((300, 10))[0] > 200 > 60 > found.getpixel((300, 390))[0]


MEMORY = """
import io, resource, sys, threading
from PIL import Image
from marval.page.studio import Studio
studio = Studio.open([sys.argv[1]], "cpu")
def content(picture, format):
    buffer = io.BytesIO(); picture.save(buffer, format); return buffer.getvalue()
kinds = [content(Image.new("RGB", (2000, 2000), "red"), "PNG"), content(Image.new("RGB", (5900, 4200), "red"), "JPEG")]
studio.upload(content(Image.new("RGB", (200, 200)), "PNG"), sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
threads = [threading.Thread(target=studio.upload, args=(kinds[i % 2], sys.argv[1])) for i in range(16)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_sixteen_uploads_at_once_take_the_memory_of_one(folder):
    done = subprocess.run([sys.executable, "-c", MEMORY, folder], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 80  # MB; 16 PNGs of 4 million pixels are 200 as RGB alone


def test_uploads_are_unpacked_one_at_a_time(studio, folder, monkeypatch):
    inside, most = [], []

    def slow(given, side):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return Image.new("L", (8, 8))

    monkeypatch.setattr(studio_module, "read_upload", slow)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: studio.upload(b"", str(folder)), range(8)))
    assert most == [1] * 8


# S2, A8: recipes in pictures


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
    ({"reward": "os:getcwd"}, "not a recipe"),  # S8: no file may name code
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
    config = dataclasses.replace(tiny_config(), space=dataclasses.replace(tiny_config().space, image_size=(128, 128)))
    mar = dataclasses.replace(config.mar, token_grid=(64, 64))
    save_model(
        tmp_path / "larger", Pipeline(type(tiny_model())(mar), config).model, dataclasses.replace(config, mar=mar)
    )
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
    (tmp_path / "unfinished").mkdir()  # F21: a run's folder in which there is no model yet
    if kind == "fifo":
        os.mkfifo(tmp_path / "unfinished" / WEIGHTS)
        assert one_line(command("sample", "unfinished"), "does not exist, or is no file")
        (tmp_path / "a.png").unlink()
    if kind != "folder":
        assert one_line(like(command, tmp_path, recipe, "unfinished"), "unfinished has no model.safetensors")


# S3, S7, S8: checkpoints


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
    ({"name": "/tmp/elsewhere"}, r"name (is )?'/tmp/elsewhere': expected a plain name"),  # S3, A9
    ({"name": "../elsewhere"}, r"name (is )?'../elsewhere': expected a plain name"),
    ({"name": "..\\elsewhere"}, "expected a plain name"),
    ({"name": ".hidden"}, "expected a plain name"),
    ({"name": "a\nb"}, "expected a plain name"),
    ({"name": "a" * 101}, "expected a plain name"),
    ({"name": 3}, "name (is )?3"),
    ({"data": "folder://host/share"}, "data are 'folder://host/share': expected a place on this machine"),
    ({"data": "\\\\host\\share"}, "expected a place on this machine"),
    ({"reward": "os:getcwd"}, "unexpected keyword argument 'reward'"),  # S8: no file may name code
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


# S4, S5, S6, S10, S11: the page


ODD = """
import time
from marval.cli import main
from marval.page.studio import STAYS, Studio
real = Studio.frames

def frames(self, recipe, before=None):
    if recipe.seed == 13:
        raise ZeroDivisionError("boom")
    while recipe.seed >= 500 and STAYS.get()():
        time.sleep(0.05)
    yield from real(self, recipe, before)

Studio.frames = frames
main()
"""


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """The tiny teacher, served; seed 13 fails, and those from 500 on take for ever. The address, and where it runs."""
    cwd = tmp_path_factory.mktemp("attacked")
    with serving(str(folder), cwd=cwd, script=ODD) as (address, _):
        yield address, cwd


def test_nobody_takes_every_place(server, folder):
    """One address with many sessions gets a quarter of the places; another visitor's drawing begins at once."""
    address, _ = server
    forger = Forger(address)
    start = forger.handler("mv-start")
    given = forger.usual(start)
    given[forger.labels(start).index("Seed")] = 500

    def ask(session, host):
        body = json.dumps({"fn_index": start["id"], "session_hash": session, "data": given})
        headers = {"content-type": "application/json", "x-forwarded-for": host}  # as from a proxy on this machine
        return forger.http.post("gradio_api/queue/join", content=body, headers=headers)

    first = [ask("greedy", "10.0.0.1") for _ in range(shares.OF_SESSION + 1)]
    assert [answer.status_code for answer in first] == [200] * shares.OF_SESSION + [429]
    assert first[-1].json() == {"detail": "you have 4 drawings under way or waiting: wait until one is done"}
    others = [ask(f"session {i}", "10.0.0.1") for i in range(18)]
    assert [answer.status_code for answer in others] == [200] * 16 + [429] * 2
    assert others[-1].json() == {"detail": "your address has 20 drawings under way or waiting: try again later"}
    (picture,) = Client(address, verbose=False).predict(
        model=str(folder), classes=["cross"], seed=1, iterations=2, api_name="/draw"
    )
    assert picture["recipe"]["seed"] == 1


@pytest.mark.parametrize(
    ("host", "counts_as"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:db8::ffff:1", "2001:db8::/64"),
        ("unix", "unix"),
    ],
)
def test_the_addresses_of_one_network_are_one(host, counts_as):
    client = type("Client", (), {"host": host})
    assert shares.address(type("Event", (), {"request": type("Request", (), {"client": client})})()) == counts_as


def test_who_does_not_listen_is_dropped(studio):
    """Messages of a drawing that nobody fetches do not pile up, and the drawing ends."""
    from gradio.queueing import AsyncQueue, Event
    from gradio.server_messages import ProcessStartsMessage

    queue = build(studio)._queue
    event = Event("a", next(iter(queue.blocks.fns.values())), None, None)
    queue.pending_messages_per_session["a"] = AsyncQueue()
    for _ in range(shares.UNREAD):
        queue.send_message(event, ProcessStartsMessage())
    assert event.alive
    for _ in range(3):
        queue.send_message(event, ProcessStartsMessage())
    assert not event.alive
    assert "a" not in queue.pending_messages_per_session


def test_a_password_is_asked_for(folder, tmp_path):
    with serving(str(folder), cwd=tmp_path, MARVAL_AUTH="anna:secret:word") as (address, _):
        assert httpx.get(address + "config").status_code == 401
        body = {"fn_index": 0, "session_hash": "a", "data": []}
        assert httpx.post(address + "gradio_api/queue/join", json=body).status_code == 401
        assert httpx.post(address + "gradio_api/upload", files={"files": b"a"}).status_code == 401
        for wrong in ("anna:secret", "anna:", "bert:secret:word"):
            name, _, password = wrong.partition(":")
            assert httpx.post(address + "login", data={"username": name, "password": password}).status_code in (
                400,
                422,
            )
        client = Client(address, verbose=False, auth=("anna", "secret:word"))
        (picture,) = client.predict(model=str(folder), classes=["cross"], api_name="/draw")
        assert picture["recipe"]["class"] == "cross"


def large(nbytes):
    """A picture that takes this much memory."""
    tokens = torch.zeros(1, 1)
    return Picture(tokens, torch.zeros(1, nbytes // 4, 1), None, "")


@pytest.fixture
def sessions(studio):
    """Sessions of a page, as gradio keeps them: `keep(name, bytes)` puts a picture on a visitor's desk."""
    from gradio.state_holder import StateHolder

    page, holder = build(studio), StateHolder()
    page.state_session_capacity = 1000
    holder.set_blocks(page)
    (desk,) = [number for number, block in page.blocks.items() if isinstance(getattr(block, "value", None), Desk)]
    memory = shares.Memory()

    def keep(name, nbytes):
        holder[name][desk] = Desk(large(nbytes))
        memory.tidy(holder, name)
        return set(holder.session_data)

    return holder, keep


def test_what_is_kept_is_bounded_by_size(sessions, monkeypatch):
    _, keep = sessions
    keep("nobody", 4)
    monkeypatch.setattr(shares, "ALL_BYTES", 50_000_000)
    monkeypatch.setattr(shares, "SESSION_BYTES", 30_000_000)
    assert keep("a", 20_000_000) == {"nobody", "a"}
    assert keep("b", 20_000_000) == {"nobody", "a", "b"}
    assert keep("a", 21_000_000) == {"nobody", "a", "b"}
    assert keep("c", 20_000_000) == {"a", "c"}  # the oldest go first
    assert keep("d", 31_000_000) == {"a", "c"}  # more than one visitor may have


def test_sessions_expire(sessions):
    holder, keep = sessions
    keep("old", 1000)
    holder.time_last_used["old"] -= datetime.timedelta(seconds=shares.EXPIRY + 1)
    assert keep("new", 1000) == {"new"}


def test_pictures_to_take_back_are_bounded_by_size():
    desk = Desk()
    for _ in range(10):
        desk = desk.put(large(4_000_000))
    assert len(desk.past) == 4
    assert 20_000_000 < desk.nbytes < 21_000_000


def test_uploads_do_not_stay_on_the_disk(server):
    address, cwd = server
    (folder,) = cwd.glob("marval-uploads-*")

    def files():
        return [file for file in folder.rglob("*") if file.is_file()]

    def upload(count, size=1):
        found = [("files", (f"{i}.png", os.urandom(size))) for i in range(count)]
        return httpx.post(address + "gradio_api/upload", files=found, timeout=30)

    forger = Forger(address)
    (path,) = httpx.post(
        address + "gradio_api/upload", files={"files": ("a.png", content(Image.new("L", (9, 9))))}, timeout=30
    ).json()
    assert len(files()) == 1
    (take,) = [h for h in forger.handlers if "file" in forger.labels(h)]
    data = forger.usual(take)
    data[forger.labels(take).index("file")] = {"path": path, "meta": {"_type": "gradio.FileData"}}
    data[forger.labels(take).index("Model")] = forger.usual(forger.handler("mv-start"))[1]
    assert forger.send(take, data) is None
    assert files() == []  # read, and removed
    assert upload(uploads.UPLOADED_FILES).status_code == 200
    answer = upload(1)
    assert (answer.status_code, answer.json()["detail"]) == (
        507,
        "too many uploads at the moment: try again in a few minutes",
    )
    for file in files():
        file.unlink()
    answers = [upload(1, 5_000_000).status_code for _ in range(23)]
    assert answers == [200] * 21 + [507] * 2  # 100 MB, and the one that goes beyond it
    for file in files():
        file.unlink()


HOSTS = [
    ("localhost:{port}", 200), ("127.0.0.1:{port}", 200), ("[::1]:{port}", 200), ("LOCALHOST", 200),
    ("evil.example", 421), ("evil.example:{port}", 421), ("localhost.evil.example:{port}", 421), ("", 421),
    ("127.0.0.1.evil.example", 421), ("0.0.0.0:{port}", 421),
]  # fmt: skip


@pytest.mark.parametrize(("host", "status"), HOSTS, ids=str)
def test_another_name_for_this_machine_is_refused(server, host, status):
    port = httpx.URL(server[0]).port
    headers = {"host": host.format(port=port)}
    assert httpx.get(server[0] + "gradio_api/app_id", headers=headers).status_code == status


def test_another_sites_page_cannot_send(server):
    headers = {"sec-fetch-site": "cross-site", "origin": "https://evil.example"}
    answer = httpx.post(server[0] + "gradio_api/upload", files={"files": b"a"}, headers=headers)
    assert (answer.status_code, answer.json()["detail"]) == (403, "another site's page may not draw here")
    assert httpx.get(server[0], headers=headers).status_code == 200  # a link may lead here


def test_an_error_of_the_server_is_logged_with_its_trace_and_shown_as_one(server, folder):
    address, cwd = server
    forger = Forger(address)
    start = forger.handler("mv-start")
    data = forger.usual(start)
    seed = forger.labels(start).index("Seed")
    data[seed] = -1
    assert len(forger.send(start, data).splitlines()) == 1
    assert "Traceback" not in (cwd / "log.txt").read_text()  # it was the visitor's mistake
    data[seed] = 13
    assert forger.send(start, data) == BROKEN
    with pytest.raises(Exception, match=BROKEN):
        Client(address, verbose=False).predict(model=str(folder), classes=["cross"], seed=13, api_name="/draw")
    log = (cwd / "log.txt").read_text()
    assert log.count("Traceback") == log.count("ZeroDivisionError: boom") == 2
    data[seed] = 12
    assert forger.send(start, data) is None


def test_a_route_that_fails_is_a_server_error(caplog, tmp_path):
    import asyncio

    async def broken(scope, receive, send):
        raise ZeroDivisionError("boom")

    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/config", "headers": [(b"host", b"localhost")]}
    asyncio.run(Guard(broken, "127.0.0.1", tmp_path)(scope, None, send))
    assert sent[0]["status"] == 500
    assert json.loads(sent[1]["body"]) == {"detail": BROKEN}
    assert "ZeroDivisionError: boom" in caplog.text


# S12 is among the malformed recipes: an upload's size is known before it is unpacked.


def test_no_message_sends_anybody_to_a_package_that_may_be_a_strangers():  # S13
    assert [file.name for file in SOURCE.rglob("*.py") if "install 'marval" in file.read_text()] == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--port", 0), ["--port 0", "1 to 65535"]),
        (("--port", 99999), ["--port 99999", "1 to 65535"]),
        (("--port", -1), ["--port"]),
        (("--port", "taken"), ["--port or --host"]),
        (("--host", "no.such.host.invalid"), ["no.such.host.invalid", "--port or --host"]),
        (("--host", "192.0.2.1"), ["192.0.2.1", "--port or --host"]),
        (("--host", "a" * 300), ["--port or --host"]),
        (("--auth", "anna"), ["--auth", "anna:secret"]),
        (("--auth", ":secret"), ["--auth"]),
    ],
    ids=str,
)
def test_where_nobody_can_serve_is_one_line(monkeypatch, capsys, options, words):
    monkeypatch.setattr(Studio, "open", lambda *given: pytest.fail("models were loaded"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        options = [str(taken.getsockname()[1] if option == "taken" else option) for option in options]
        free = [] if "--port" in options else ["--port", str(free_port())]
        monkeypatch.setattr(sys, "argv", ["marval", "serve", "fashion-student", *free, *options])
        with pytest.raises(SystemExit) as end:
            main()
    assert one_line((end.value.code, capsys.readouterr().err.strip()), *words)
