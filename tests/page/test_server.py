"""The page as programs meet it: what they may ask for, what is refused, who waits for whom, and who is let in."""

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
from marval.page import server as server_module
from marval.page.guard import LARGEST_BODY, OF_ADDRESS
from marval.page.studio import Studio
from processes import marval
from serving import ask, in_thread, serving

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def studio(folder):
    return Studio([str(folder)], "cpu")


@pytest.fixture
def wanted(folder):
    return {"model": str(folder), "class": "cross", "seed": 1, "iterations": 2}


@pytest.fixture(scope="module")
def page(studio):
    """The tiny teacher, served: the address."""
    with in_thread(studio) as address:
        yield address


@pytest.fixture
def held(page, monkeypatch):
    """Drawings wait until they are let go: the seeds in the order they were drawn, and the event that lets them go."""
    go, seeds, real = threading.Event(), [], Studio.draw

    def draw(self, job, show):
        seeds.append(job[0].seed)
        assert go.wait(60)
        return real(self, job, show)

    monkeypatch.setattr(Studio, "draw", draw)
    yield seeds, go
    go.set()


def wait_for(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it does not happen")


def one_line(error):
    return error and len(error.splitlines()) == 1 and len(error) <= 300


def test_the_example_of_the_docs_runs(server, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/serve.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("http://127.0.0.1:7860/", server[0]), "docs/serve.md", "exec"), {})
    expected = to_pil(package.load("fashion-student").sample(["bag"], seed=8, iterations=8)[0])
    bag = Image.open("fashion-student-bag-seed8-K8.png")
    (edited,) = tmp_path.glob("fashion-student-coat-seed0-K*-edited.png")
    coat = Image.open(edited)
    assert bag.tobytes() == expected.tobytes()
    assert coat.crop((0, 12, 28, 28)).tobytes() == bag.crop((0, 12, 28, 28)).tobytes()
    assert coat.crop((0, 0, 28, 12)).tobytes() != bag.crop((0, 0, 28, 12)).tobytes()
    result = marval("sample", "--like", edited.name, "--out", "again", cwd=tmp_path)
    assert "the same, pixel for pixel" in result.stdout, result.stdout + result.stderr


def test_it_listens_on_this_machine_only_and_ends_when_it_is_told(folder, tmp_path):
    with serving(str(folder), cwd=tmp_path) as (address, process):
        listening = [c.laddr for c in psutil.Process(process.pid).net_connections("tcp") if c.status == "LISTEN"]
        assert [(at.ip, at.port) for at in listening] == [("127.0.0.1", httpx.URL(address).port)]
        with httpx.stream("POST", address + "draw", json={"pictures": [{"model": str(folder), "class": 0}] * 64}):
            process.send_signal(signal.SIGINT)  # with a visitor there
            assert process.wait(timeout=20) == 0
    assert "Traceback" not in (tmp_path / "log.txt").read_text()


FORGED = [
    ("{", 400, "Expecting property name"),
    ("[" * 100_000, 400, "recursion"),
    ("1" * 5000, 400, "digits"),
    ('{"pictures": 3}', 400, "pictures"),
    ('{"pictures": []}', 400, "0 pictures: expected 1 to 64"),
    ('{"pictures": [null]}', 400, "with a model and a class"),
    ('{"pictures": [{"model": "/etc/passwd", "class": 0}]}', 400, "no model '/etc/passwd'"),
    (b"\xff\xfe\x00", 400, ""),
    ("x" * (LARGEST_BODY + 1), 413, "too large: at most 8 MB"),
    ((bytes(2**20) for _ in range(10)), 413, "too large: at most 8 MB"),  # without its length
]


@pytest.mark.parametrize(("body", "status", "message"), FORGED, ids=range(len(FORGED)))
def test_a_forged_request_is_refused_in_a_line(page, body, status, message):
    answer = httpx.post(page + "draw", content=body, headers={"content-type": "application/json"}, timeout=30)
    assert answer.status_code == status
    assert one_line(answer.json()["error"])
    assert message in answer.json()["error"]


@pytest.mark.parametrize("value", [None, -1, True, 10**30, "9" * 5000, [[]], {}, "\n" * 9])
def test_garbage_in_any_field_is_refused_or_harmless(page, wanted, value):
    for name in ("model", "class", "seed", "iterations", "order", "guidance", "picture", "redrawn", "keep", "extra"):
        answer = ask(page, {**wanted, name: value})
        if isinstance(answer, list):
            assert "picture" in answer[-1] or one_line(answer[-1]["error"])
            assert "something went wrong" not in str(answer)
        else:
            assert answer[0] == 400
            assert one_line(answer[1])


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "", 200), ("GET", "page.js", 200), ("GET", "draw", 404), ("GET", "../server.py", 404),
        ("GET", "%2e%2e/server.py", 404), ("POST", "models", 405), ("POST", "draw", 415),
        ("POST", "upload?model=nothing", 400),
    ],
)  # fmt: skip
def test_routes(page, method, path, status):
    answer = httpx.request(method, page + path)
    assert answer.status_code == status
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert status == 200 or one_line(answer.json()["error"])


def test_visitors_at_once_each_get_their_own(page, folder, studio, wanted):
    pipeline = studio.served(str(folder)).pipeline
    with concurrent.futures.ThreadPoolExecutor(OF_ADDRESS) as pool:
        answers = list(pool.map(lambda seed: ask(page, {**wanted, "seed": seed}), range(OF_ADDRESS)))
    for seed, events in enumerate(answers):
        tokens = pipeline.sample_tokens([0], seeds=[seed], iterations=2)[0]
        assert base64.b64decode(events[-1]["picture"]["tokens"]) == tokens.numpy().tobytes()


def test_requests_take_turns_picture_by_picture_and_nobody_has_too_many(page, held, wanted):
    seeds, go = held
    with concurrent.futures.ThreadPoolExecutor(OF_ADDRESS + 2) as pool:
        first = pool.submit(ask, page, *[{**wanted, "seed": i} for i in range(3)])
        wait_for(lambda: seeds == [0])
        rest = [pool.submit(ask, page, {**wanted, "seed": 10 + i}) for i in range(OF_ADDRESS)]
        done = concurrent.futures.wait(rest, 30, concurrent.futures.FIRST_COMPLETED).done
        refused = (429, f"you have {OF_ADDRESS} drawings under way or waiting: wait until one is done")
        assert [one.result() for one in done] == [refused]  # the others wait
        time.sleep(0.5)  # in the queue of the thread
        other = pool.submit(ask, page, {**wanted, "seed": 5}, headers={"x-forwarded-for": "10.0.0.1"})
        go.set()
        assert all("picture" in one.result()[-1] for one in [first, other, *(set(rest) - done)])
    assert {0, 1, 2, 5} <= set(seeds)
    assert all(seed >= 10 for seed in seeds[1:OF_ADDRESS])  # before the first one's second picture
    assert "picture" in ask(page, wanted)[-1]  # the places are free again


def test_who_leaves_stops_the_drawing_and_who_leaves_while_waiting_costs_nothing(studio, folder, page, wanted):
    calls = studio.served(str(folder)).calls
    with httpx.stream("POST", page + "draw", json={"pictures": [{**wanted, "iterations": 16}] * 64}) as answer:
        assert json.loads(next(answer.iter_lines()))["iteration"] == 1
    done = ask(page, {**wanted, "seed": 5})[-1]  # its turn comes at once, not after 64 pictures
    assert done["picture"]["recipe"]["seed"] == 5
    time.sleep(0.5)
    assert calls["head"] == 2 * 8  # nothing was drawn since


def test_a_bug_is_logged_with_its_trace_and_shown_as_one(page, wanted, monkeypatch, caplog):
    def broken(self, *given):
        raise ZeroDivisionError("boom")

    monkeypatch.setattr(Studio, "draw", broken)
    assert ask(page, wanted) == [{"error": "something went wrong here; it has been logged"}]
    assert "ZeroDivisionError: boom" in caplog.text


HOSTS = [
    ("localhost:{port}", 200), ("[::1]:{port}", 200), ("LOCALHOST", 200), ("", 421), ("evil.example:{port}", 421),
    ("localhost.evil.example:{port}", 421), ("127.0.0.1.evil.example", 421), ("0.0.0.0:{port}", 421),
]  # fmt: skip


@pytest.mark.parametrize(("host", "status"), HOSTS, ids=str)
def test_another_name_for_this_machine_is_refused(page, host, status):
    assert httpx.get(page, headers={"host": host.format(port=httpx.URL(page).port)}).status_code == status


def test_another_sites_page_cannot_send(page):
    headers = {"sec-fetch-site": "cross-site", "origin": "https://evil.example"}
    answer = httpx.post(page + "upload", content=b"", headers=headers)
    assert (answer.status_code, answer.json()["error"]) == (403, "another site's page may not draw here")
    assert httpx.get(page, headers=headers).status_code == 200  # a link may lead here


def test_a_password_is_asked_for(studio, wanted):
    with in_thread(studio, host="0.0.0.0", auth="anna:secret:word") as address:
        for auth in (None, ("anna", "secret"), ("bert", "secret:word")):
            for answer in (httpx.get(address, auth=auth), httpx.post(address + "draw", auth=auth)):
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Basic")
        assert "picture" in ask(address, wanted, auth=("anna", "secret:word"))[-1]


@pytest.mark.parametrize(
    "options",
    [
        ("--port", 99999), ("--port", "taken"), ("--host", "no.such.host.invalid"), ("--host", "192.0.2.1"),
        ("--host", "a" * 64), ("--auth", "anna"), ("--auth", ":secret"),
    ],
    ids=str,
)  # fmt: skip
def test_where_nobody_can_serve_is_one_line(monkeypatch, capsys, options):
    monkeypatch.setattr(Studio, "__init__", lambda *given: pytest.fail("models were loaded"))
    with server_module.listen("127.0.0.1", 0) as taken:
        options = [str(taken.getsockname()[1] if option == "taken" else option) for option in options]
        free = [] if "--port" in options else ["--port", "0"]
        monkeypatch.setattr("sys.argv", ["marval", "serve", "fashion-student", *free, *options])
        with pytest.raises(SystemExit) as end:
            main()
    told = capsys.readouterr().err.strip()
    assert end.value.code == 2
    assert one_line(told)
    assert options[0] in told
