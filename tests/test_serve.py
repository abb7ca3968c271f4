"""`marval serve` as programs meet it: a real server, its endpoints, forged requests, and many visitors at once."""

import base64
import concurrent.futures
import io
import re
import time

import numpy as np
import psutil
import pytest
from gradio_client import Client
from PIL import Image

import marval as package
from marval.io.checkpoint import save_model
from marval.io.images import to_pil
from processes import marval, refused
from serving import MODELS, ROOT, SCREENSHOTS, needs_chromium, serving
from test_forged import Forger
from test_page import BAD_FILES
from tiny import tiny_config, tiny_model


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))


def test_it_listens_on_this_machine_only_and_says_when_the_port_is_taken(server, tmp_path):
    address, process = server
    port = int(address.rstrip("/").rsplit(":", 1)[1])
    listening = [c.laddr for c in psutil.Process(process.pid).net_connections("tcp") if c.status == "LISTEN"]
    assert [(at.ip, at.port) for at in listening] == [("127.0.0.1", port)]
    assert refused(marval("serve", "fashion-student", "--port", port, cwd=tmp_path), str(port), "--port")
    assert refused(marval("serve", "fashion-studnt", cwd=tmp_path), "fashion-student")


def test_the_example_of_the_docs_runs(server, tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/serve.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("http://127.0.0.1:7860", server[0]), "docs/serve.md", "exec"), {})
    output = capsys.readouterr().out
    assert all(name in output for name in MODELS)
    assert output.rstrip().endswith("[0, 1, 2]")
    expected = to_pil(package.load("fashion-student").sample(["bag"], seed=8, iterations=8)[0])
    bag, coat = Image.open("bag-8.png"), Image.open("bag-coat.png")
    assert bag.tobytes() == expected.tobytes()
    assert coat.crop((0, 12, 28, 28)).tobytes() == bag.crop((0, 12, 28, 28)).tobytes()
    assert coat.crop((0, 0, 28, 12)).tobytes() != bag.crop((0, 0, 28, 12)).tobytes()
    result = marval("sample", "--like", "bag-coat.png", "--out", "again", cwd=tmp_path)
    assert "the same, pixel for pixel" in result.stdout, result.stdout + result.stderr


def test_the_endpoints_are_documented(server):
    api = Client(server[0], verbose=False).view_api(return_format="dict")["named_endpoints"]
    assert set(api) == {"/models", "/draw", "/edit", "/vary"}
    assert "Redraw some tokens" in api["/edit"]["description"]
    assert [p["parameter_name"] for p in api["/draw"]["parameters"]][:4] == ["model", "classes", "seed", "iterations"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "0 to 999999"), ({"seed": 10**9}, "0 to 999999"), ({"classes": ["circle"]}, "unknown class"),
        ({"classes": ["10"]}, "0 to 9"), ({"classes": []}, "expected 1 to 8"), ({"iterations": 50}, "1 to 49"),
        ({"model": "/etc/passwd"}, "no model"),
    ],
    ids=str,
)  # fmt: skip
def test_a_program_cannot_send_what_is_out_of_range(server, change, message):
    given = {"model": "fashion-student", "classes": ["bag"], "seed": 0, "iterations": 4, **change}
    with pytest.raises(Exception, match=message):
        Client(server[0], verbose=False).predict(**given, api_name="/draw")


def test_bad_files_and_endless_bodies_are_refused(server):
    client = Client(server[0], verbose=False)
    given = {"model": "fashion-student", "tokens": [0], "class_name": "bag", "api_name": "/edit"}
    for file, message in (BAD_FILES[0], BAD_FILES[5], BAD_FILES[8]):
        with pytest.raises(Exception, match=message):
            client.predict(png=base64.b64encode(file).decode(), **given)
    with pytest.raises(Exception, match="base64"):
        client.predict(png="?", **given)
    import httpx

    assert httpx.post(server[0] + "gradio_api/queue/join", content=bytes(9_000_000)).status_code == 413


def visit(address, seed, rounds=1):
    """A visitor who draws, each time with another seed: the pictures by seed."""
    client, found = Client(address, verbose=False), {}
    for i in range(rounds):
        own = seed + 1000 * i
        (picture,) = client.predict(
            model="fashion-student", classes=[str(own % 10)], seed=own, iterations=4, api_name="/draw"
        )
        assert picture["recipe"]["seed"] == own
        found[own] = pixels(picture["png"])
    return found


def expected(seeds):
    student = package.load("fashion-student")
    return {
        seed: np.asarray(to_pil(student.sample([seed % 10], seed=seed, iterations=4)[0])).astype(int) for seed in seeds
    }


def test_sixteen_visitors_at_once_each_get_their_own(server):
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda seed: visit(server[0], seed), range(16)))
    wanted = expected(range(16))
    for seed in range(16):
        assert np.array_equal(found[seed][seed], wanted[seed])


@needs_chromium
def test_own_models_and_a_full_queue(chromium, tmp_path):
    """A model of the user's beside a bundled one; then, with 16 drawings under way and 64 that wait, the next visitor
    reads a message, as do programs."""
    save_model(tmp_path / "mine", tiny_model(), tiny_config())
    with serving("fashion-teacher", "mine", cwd=tmp_path) as (address, _):
        (own,) = Client(address, verbose=False).predict(model="mine", classes=["square"], seed=3, api_name="/draw")
        assert own["recipe"]["model"] == "mine"
        (tmp_path / "own.png").write_bytes(base64.b64decode(own["png"]))
        result = marval("sample", "mine", "--like", "own.png", "--out", "again", cwd=tmp_path)
        assert "the same, pixel for pixel" in result.stdout, result.stdout + result.stderr
        forger = Forger(address)
        draw = forger.handler("mv-draw")
        given = [["fashion-teacher"], ["bag"], 0, 8, 16, 3.0, "the model's own"]

        def ask(i):  # four visitors of one session each, at one address; four addresses
            body = {"fn_index": draw["id"], "session_hash": f"others {i // 4}", "data": given}
            return forger.post("gradio_api/queue/join", headers={"x-forwarded-for": f"10.0.0.{i // 20}"}, **body)

        assert [ask(i).status_code for i in range(16 + 64)] == [200] * 80
        answer = ask(80)
        assert answer.status_code == 503
        assert "Queue is full" in answer.json()["detail"]
        with pytest.raises(Exception, match=r"Queue is full! Please try again\."):
            Client(address, verbose=False).predict(model="fashion-teacher", classes=["bag"], api_name="/draw")
        page = chromium.new_page()
        page.goto(address)
        page.click("#mv-draw")
        page.wait_for_selector(".toast-body:has-text('currently busy. Please try again')", timeout=20_000)
        page.wait_for_selector(".mv-status:has-text('Nothing was drawn: the message says why.')", timeout=20_000)
        page.wait_for_timeout(600)  # the message fades in
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENSHOTS / "queue-full.png")
        page.close()


@pytest.mark.slow
def test_sixteen_visitors_for_a_minute(tmp_path):
    """No error, everyone's own pictures, and memory that does not grow."""
    with serving("fashion-student", cwd=tmp_path) as (address, process):
        memory = psutil.Process(process.pid).memory_info
        end = time.monotonic() + 60
        samples = []

        def stay(seed):
            client, drawn = Client(address, verbose=False), {}
            while time.monotonic() < end:
                own = seed + 16 * len(drawn)
                (picture,) = client.predict(
                    model="fashion-student", classes=[str(own % 10)], seed=own, iterations=4, api_name="/draw"
                )
                drawn[own] = pixels(picture["png"])
            return drawn

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            visits = [pool.submit(stay, seed) for seed in range(16)]
            while time.monotonic() < end:
                time.sleep(2)
                samples.append(memory().rss)
            drawn = [found.result() for found in visits]
        assert sum(map(len, drawn)) > 16 * 5
        for seed, own in enumerate(drawn):
            assert {s % 16 for s in own} == {seed}
            wanted = expected(list(own)[:3] + list(own)[-3:])
            assert all(np.array_equal(own[s], picture) for s, picture in wanted.items())
        early, late = np.mean(samples[4:8]), np.mean(samples[-4:])
        assert late - early < 60e6, f"memory grew by {(late - early) / 1e6:.0f} MB: {samples}"
