"""Models on the Hugging Face hub, with its own library against a small server in the place of huggingface.co."""

import base64
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import marval
from marval.config import LatentSpace, OneStep
from marval.io.hub import fetch_model, model_card, published
from marval.pipeline import Pipeline
from tiny import tiny_config, tiny_model

pytest.importorskip("huggingface_hub")
COMMIT = "0" * 39 + "1"


class Hub(BaseHTTPRequestHandler):
    """The few routes of the hub that making, filling and reading one repository takes."""

    files: dict[str, bytes]
    asked: list[str]

    def log_message(self, *_):
        pass

    def answer(self, content, headers=None, code=200):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": len(content), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.asked.append(f"{self.command} {path}")
        if path == "/api/models/me/tiny/revision/none":
            self.answer({}, {"X-Error-Code": "RevisionNotFound"}, 404)
        elif path.startswith("/api/models/me/tiny/revision/"):
            self.answer({"_id": "1", "id": "me/tiny", "sha": COMMIT, "siblings": []})
        elif path == f"/api/models/me/tiny/tree/{COMMIT}":
            oids = {name: hashlib.sha1(content).hexdigest() for name, content in self.files.items()}
            sizes = {name: len(content) for name, content in self.files.items()}
            self.answer([{"type": "file", "path": name, "size": sizes[name], "oid": oids[name]} for name in sizes])
        elif path.startswith(f"/me/tiny/resolve/{COMMIT}/"):
            content = self.files[path.rpartition("/")[2]]
            self.answer(content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT})
        else:
            self.answer({}, {"X-Error-Code": "RepoNotFound"}, 404)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.path == "/api/repos/create":
            self.asked.append(f"create {body}")
            self.answer({"url": f"http://{self.headers['Host']}/me/tiny"})
        elif self.path.endswith("/preupload/main"):
            names = [entry["path"] for entry in json.loads(body)["files"]]
            self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif self.path.endswith("/commit/main"):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.answer({"commitOid": COMMIT, "commitUrl": f"http://{self.headers['Host']}/me/tiny/commit/{COMMIT}"})
        else:
            self.answer({})


@pytest.fixture
def hub(tmp_path):
    """A server with one repository, me/tiny, and `python`, which runs a script that knows it as the hub."""
    handler = type("Handler", (Hub,), {"files": {}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache"),
        "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip

    def python(*arguments, **more):
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment | more, capture_output=True, text=True, timeout=120
        )

    handler.python = python
    yield handler
    server.shutdown()
    server.server_close()


PUSH_AND_LOAD = """
import marval, torch
model = marval.load("model")
print(model.push_to_hub("me/tiny", private=True, license="apache-2.0"))
again = marval.load("me/tiny", revision="v1")
assert torch.equal(model.sample(["cross"], seed=3), again.sample(["cross"], seed=3))
"""


def test_a_model_is_pushed_with_its_card_and_loaded_from_there(hub, tmp_path):
    Pipeline(tiny_model(), tiny_config()).save(tmp_path / "model")
    done = hub.python("-c", PUSH_AND_LOAD)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("/me/tiny")
    assert any(asked.startswith("create") and "private" in asked for asked in hub.asked)
    assert set(hub.files) == {"model.safetensors", "config.json", "README.md"}
    read = [asked.rpartition("/")[2] for asked in hub.asked if asked.startswith("GET /me/tiny/resolve")]
    assert sorted(read) == ["config.json", "model.safetensors"]
    card = hub.files["README.md"].decode()
    for part in ("library_name: marval", "license: apache-2.0", "- marval", 'marval.load("me/tiny")', "1 square"):
        assert part in card
    # The command line takes it too; afterwards the cache does without the hub.
    done = hub.python("-m", "marval", "sample", "me/tiny", "--classes", "cross", "--out", "drawn")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "drawn").glob("*.png"))
    gone = hub.python("-c", "import marval; marval.load('me/tiny')", HF_ENDPOINT="http://127.0.0.1:1")
    assert gone.returncode == 0, gone.stderr


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("me/other", {}, "it has no such repository, or a private one"),
        ("me/tiny", {"revision": "none"}, "it has no such revision"),
        ("me/tiny", {}, "has no model.safetensors"),
        ("me/tiny", {"unreachable": True}, "it cannot be reached, and nothing is in the local cache"),
    ],
)
def test_what_the_hub_does_not_give_is_told_in_one_line(name, options, reason, hub):
    hub.files["pytorch_model.bin"] = b"never fetched"
    arguments = f"{name!r}, revision={options.get('revision')!r}"
    script = f"import marval\ntry:\n    marval.load({arguments})\nexcept ValueError as error:\n    print(error)"
    place = {"HF_ENDPOINT": "http://127.0.0.1:1"} if "unreachable" in options else {}
    done = hub.python("-c", script, **place)
    assert reason in done.stdout, done.stdout + done.stderr
    assert len(done.stdout.strip().splitlines()) == 1
    assert not any("resolve" in asked for asked in hub.asked)


def test_paths_come_first_and_the_package_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Pipeline(tiny_model(), tiny_config()).save(tmp_path / "runs/student")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    assert marval.load("runs/student").config == tiny_config()
    with pytest.raises(
        ValueError, match=r"no model 'runs/other': expected a folder, or a bundled model such as [\w, -]+$"
    ):
        marval.load("runs/other")  # runs/ is here, so this is no hub id
    fetch_model.cache_clear()
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        marval.load("user/model")


def test_a_card_names_neither_a_licence_that_nobody_chose_nor_a_folder_of_this_machine():
    space = LatentSpace((256, 256), "/home/someone/models/kl16", vae_sha256="0123abcd")
    mar = dataclasses.replace(tiny_config().mar, token_grid=space.token_grid, token_dim=space.token_dim)
    card = model_card("me/tiny", published(dataclasses.replace(tiny_config(), mar=mar, space=space, draw=OneStep())))
    assert "license" not in card
    assert "needs the VAE `kl16` (SHA-256 `0123abcd`)" in card
    assert "/home/" not in card
