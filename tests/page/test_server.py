"""The page as programs meet it: what they may ask for, what is refused, who waits for whom, and who is let in."""

import asyncio
import base64
import concurrent.futures
import json
import re
import signal
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest
from PIL import Image

import marval as package
from marval.cli import main
from marval.io.images import to_pil
from marval.page import guard
from marval.page import server as server_module
from marval.page.guard import LARGEST_BODY
from marval.page.server import BROKEN
from marval.page.studio import Studio
from marval.page.turns import OF_ADDRESS, PLACES, Turns, network_of
from processes import marval
from serving import ask, free_port, in_thread, serving
from uploads import BAD_FILES, content, photo

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def studio(folder):
    return Studio.open([str(folder)], "cpu")


@pytest.fixture
def wanted(folder):
    return {"model": str(folder), "class": "cross", "seed": 1, "iterations": 2}


@pytest.fixture(scope="module")
def page(studio):
    """The tiny teacher, served: the address."""
    with in_thread(studio) as address:
        yield address


@pytest.fixture
def held(studio, monkeypatch):
    """A page whose drawings wait until they are let go: the address, the seeds in the order they were drawn, the event
    that lets them go, and who waits."""
    go, seeds, turns, real = threading.Event(), [], Turns(), Studio.draw

    def draw(self, job, show):
        seeds.append(job.recipe.seed)
        assert go.wait(60)
        return real(self, job, show)

    monkeypatch.setattr(Studio, "draw", draw)
    monkeypatch.setattr(server_module, "Turns", lambda: turns)
    with in_thread(studio) as address:
        yield address, seeds, go, turns
        go.set()


def wait_for(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it does not happen")


def one_line(error):
    assert error
    assert len(error.splitlines()) == 1
    assert len(error) <= 300
    return True


def test_the_example_of_the_docs_runs(server, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/serve.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("http://127.0.0.1:7860/", server[0]), "docs/serve.md", "exec"), {})
    expected = to_pil(package.load("fashion-student").sample(["bag"], seed=8, iterations=8)[0])
    bag = Image.open("fashion-student-bag-seed8-K8.png")
    coat = Image.open("fashion-student-coat-seed0-K8-edited.png")
    assert bag.tobytes() == expected.tobytes()
    assert coat.crop((0, 12, 28, 28)).tobytes() == bag.crop((0, 12, 28, 28)).tobytes()
    assert coat.crop((0, 0, 28, 12)).tobytes() != bag.crop((0, 0, 28, 12)).tobytes()
    result = marval("sample", "--like", "fashion-student-coat-seed0-K8-edited.png", "--out", "again", cwd=tmp_path)
    assert "the same, pixel for pixel" in result.stdout, result.stdout + result.stderr


def test_it_listens_on_this_machine_only_and_ends_when_it_is_told(folder, tmp_path):
    with serving(str(folder), cwd=tmp_path) as (address, process):
        listening = [c.laddr for c in psutil.Process(process.pid).net_connections("tcp") if c.status == "LISTEN"]
        assert [(at.ip, at.port) for at in listening] == [("127.0.0.1", httpx.URL(address).port)]
        with httpx.stream("POST", address + "draw", json={"pictures": [{"model": str(folder), "class": 0}] * 64}):
            process.send_signal(signal.SIGINT)  # with a visitor there
            assert process.wait(timeout=20) in (0, 130)
    assert "Traceback" not in (tmp_path / "log.txt").read_text()


FORGED = [
    ("{", 400, "Expecting property name"),
    ("[]", 400, "pictures"),
    ("[" * 100_000, 400, "nested too deeply"),
    ("1" * 5000, 400, "digits"),
    ('{"pictures": 3}', 400, "pictures"),
    ('{"pictures": []}', 400, "0 pictures: expected 1 to 64"),
    (json.dumps({"pictures": [{}] * 65}), 400, "65 pictures"),
    ('{"pictures": [null]}', 400, "needs a model and a class"),
    ('{"pictures": [{"model": "/etc/passwd", "class": 0}]}', 400, "no model '/etc/passwd'"),
    ('{"pictures": [{"model": 7, "class": 0}]}', 400, "model"),
    (b"\xff\xfe\x00", 400, ""),
    ("x" * (LARGEST_BODY + 1), 413, "too large: at most 8 MB"),
]


@pytest.mark.parametrize(("body", "status", "message"), FORGED, ids=range(len(FORGED)))
def test_a_forged_request_is_refused_in_a_line(page, body, status, message):
    answer = httpx.post(page + "draw", content=body, headers={"content-type": "application/json"}, timeout=30)
    assert answer.status_code == status
    assert one_line(answer.json()["error"])
    assert message in answer.json()["error"]
    assert "default-src 'none'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    "value", [None, -1, True, float("nan"), 10**30, "<script>", "9" * 5000, [], [[]], {}, "\n" * 9]
)
def test_garbage_in_any_field_is_refused_or_harmless(page, wanted, value):
    for name in ("model", "class", "seed", "iterations", "order", "guidance", "picture", "redrawn", "keep", "extra"):
        body = json.dumps({"pictures": [{**wanted, name: value}]})
        answer = httpx.post(page + "draw", content=body, headers={"content-type": "application/json"})
        if answer.status_code == 200:
            assert json.loads(answer.text.splitlines()[-1])["picture"]
        else:
            assert answer.status_code == 400
            assert one_line(answer.json()["error"])


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "", 200), ("GET", "page.js", 200), ("GET", "models", 200), ("GET", "draw", 404), ("POST", "", 405),
        ("GET", "nothing", 404), ("GET", "../server.py", 404), ("GET", "%2e%2e/server.py", 404),
        ("POST", "models", 405), ("POST", "draw", 415), ("POST", "upload?model=nothing", 400),
    ],
)  # fmt: skip
def test_routes(page, method, path, status):
    answer = httpx.request(method, page + path)
    assert answer.status_code == status
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert status == 200 or one_line(answer.json()["error"])


def test_uploads_good_and_bad(page, folder, wanted):
    def upload(file):
        return httpx.post(page + "upload", params={"model": str(folder)}, content=file, timeout=30)

    for file, message in BAD_FILES.values():
        answer = upload(file)
        assert answer.status_code == 400
        assert re.search(message, answer.json()["error"])
    picture = upload(content(photo(), "JPEG")).json()
    *_, last = ask(page, {**wanted, "picture": picture, "redrawn": [3]})
    assert last["picture"]["recipe"]["upload"] == picture["upload"]


def test_an_endless_body_is_cut_off(page):
    def endless():
        for _ in range(LARGEST_BODY // 2**20 + 2):
            yield bytes(2**20)

    answer = httpx.post(page + "upload", content=endless(), timeout=30)
    assert (answer.status_code, answer.json()["error"]) == (413, "too large: at most 8 MB")


def test_sixteen_visitors_at_once_each_get_their_own(page, folder, studio, wanted):
    pipeline = studio.served(str(folder)).pipeline
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        ways = [(seed, {"x-forwarded-for": f"10.0.0.{seed % 4}"}) for seed in range(16)]  # four of each address
        found = list(pool.map(lambda way: ask(page, {**wanted, "seed": way[0]}, headers=way[1]), ways))
    for seed, events in enumerate(found):
        picture = events[-1]["picture"]
        tokens = pipeline.sample_tokens([0], seeds=[seed], iterations=2)[0]
        assert base64.b64decode(picture["tokens"]) == tokens.numpy().tobytes()
        assert picture["recipe"]["seed"] == seed


def test_two_visitors_share_the_drawing_thread_however_much_one_asks_for(held, wanted):
    address, seeds, go, turns = held
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        greedy = {"headers": {"x-forwarded-for": "10.0.0.1"}}
        for first in (100, 200, 300):
            pool.submit(ask, address, *[{**wanted, "seed": first + i} for i in range(3)], **greedy)
            wait_for(lambda first=first: (first == 100 and seeds) or first > 100)
            time.sleep(0.3)
        pool.submit(ask, address, *[{**wanted, "seed": i} for i in range(3)], headers={"x-forwarded-for": "10.0.0.2"})
        wait_for(lambda: len(turns.waiting) == 3)
        go.set()
    assert [seed // 100 for seed in seeds[:6]] == [1, 2, 0, 3, 0, 1]  # every second turn, but for who came first
    assert sorted(seeds) == [0, 1, 2, 100, 101, 102, 200, 201, 202, 300, 301, 302]


def test_nobody_takes_every_place(held, wanted):
    address, seeds, go, turns = held

    def ask_as(visitor):
        return ask(address, wanted, headers={"x-forwarded-for": visitor})

    with concurrent.futures.ThreadPoolExecutor(PLACES) as pool:
        asked = [pool.submit(ask_as, f"10.0.0.{i}") for i in range(PLACES // OF_ADDRESS) for _ in range(OF_ADDRESS)]
        wait_for(lambda: turns.places.total() == PLACES)
        assert ask_as("10.0.1.1") == (503, "too many visitors at the moment: try again in a minute")
        assert ask_as("10.0.0.1") == (429, "you have 8 drawings under way or waiting: wait until one is done")
        go.set()
        assert all("picture" in one.result()[-1] for one in asked)
    assert len(seeds) == PLACES
    assert "picture" in ask_as("10.0.0.1")[-1]  # the places are free again


def test_who_leaves_stops_the_drawing_and_who_leaves_while_waiting_costs_nothing(studio, folder, wanted):
    calls = studio.served(str(folder)).calls
    with in_thread(studio) as address:
        long = {**wanted, "iterations": 16}
        with httpx.stream("POST", address + "draw", json={"pictures": [long] * 64}) as answer:
            lines = answer.iter_lines()
            assert json.loads(next(lines))["iteration"] == 1
        done = ask(address, {**wanted, "seed": 5})[-1]  # its turn comes at once, not after 64 pictures
        assert done["picture"]["recipe"]["seed"] == 5
        assert calls["head"] == 2 * 8
        time.sleep(0.5)
        assert calls["head"] == 2 * 8  # nothing was drawn since


def test_who_does_not_read_is_given_up(monkeypatch, caplog):
    async def answer(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def stuck(message):
        await asyncio.sleep(3600)

    monkeypatch.setattr(guard, "PATIENCE", 0.1)
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")]}
    asyncio.run(guard.Guard(answer, "localhost")(scope, None, stuck))
    assert "did not read" in caplog.text


def test_a_bug_is_logged_with_its_trace_and_shown_as_one(studio, page, wanted, monkeypatch, caplog):
    def broken(self, *given):
        raise ZeroDivisionError("boom")

    monkeypatch.setattr(Studio, "draw", broken)
    assert ask(page, wanted) == [{"error": BROKEN}]
    monkeypatch.setattr(Studio, "job", broken)
    assert ask(page, wanted) == (500, BROKEN)
    wait_for(lambda: caplog.text.count("ZeroDivisionError: boom") == 2)  # uvicorn logs it after it has answered
    caplog.clear()
    monkeypatch.undo()
    assert ask(page, {**wanted, "seed": -1})[0] == 400
    assert caplog.text == ""


HOSTS = [
    ("localhost:{port}", 200), ("127.0.0.1:{port}", 200), ("[::1]:{port}", 200), ("LOCALHOST", 200),
    ("evil.example", 421), ("evil.example:{port}", 421), ("localhost.evil.example:{port}", 421), ("", 421),
    ("127.0.0.1.evil.example", 421), ("0.0.0.0:{port}", 421),
]  # fmt: skip


@pytest.mark.parametrize(("host", "status"), HOSTS, ids=str)
def test_another_name_for_this_machine_is_refused(page, host, status):
    answer = httpx.get(page, headers={"host": host.format(port=httpx.URL(page).port)})
    assert answer.status_code == status


def test_another_sites_page_cannot_send(page):
    headers = {"sec-fetch-site": "cross-site", "origin": "https://evil.example"}
    answer = httpx.post(page + "upload", content=b"", headers=headers)
    assert (answer.status_code, answer.json()["error"]) == (403, "another site's page may not draw here")
    assert httpx.get(page, headers=headers).status_code == 200  # a link may lead here


def test_a_password_is_asked_for(studio, wanted):
    with in_thread(studio, host="0.0.0.0", auth="anna:secret:word") as address:
        for auth in (None, ("anna", "secret"), ("anna", ""), ("bert", "secret:word")):
            for answer in (httpx.get(address, auth=auth), httpx.post(address + "draw", auth=auth)):
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Basic"
        assert "picture" in ask(address, wanted, auth=("anna", "secret:word"))[-1]


@pytest.mark.parametrize(
    ("host", "visitor"),
    [("10.0.0.1", "10.0.0.1"), ("2001:db8::1", "2001:db8::/64"), ("2001:db8::f:1", "2001:db8::/64"), ("unix", "unix")],
)
def test_the_addresses_of_one_network_are_one(host, visitor):
    assert network_of(host) == visitor


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--port", 0), ["--port 0", "1 to 65535"]),
        (("--port", 99999), ["--port 99999", "1 to 65535"]),
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
    with server_module.listen("127.0.0.1", free_port()) as taken:
        options = [str(taken.getsockname()[1] if option == "taken" else option) for option in options]
        free = [] if "--port" in options else ["--port", str(free_port())]
        monkeypatch.setattr("sys.argv", ["marval", "serve", "fashion-student", *free, *options])
        with pytest.raises(SystemExit) as end:
            main()
    told = capsys.readouterr().err.strip()
    assert end.value.code == 2
    assert len(told.splitlines()) == 1
    assert all(word in told for word in words)
