"""`marval serve` as its visitors meet it: a real server, programs that call it, and a real headless Chromium."""

import base64
import concurrent.futures
import contextlib
import io
import os
import re
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from gradio_client import Client
from PIL import Image

import marval as package
from marval.io.images import to_pil
from marval.recipe import read_recipe
from test_cli import MARVAL, marval, refused
from test_page import BAD_FILES, content, photo

ROOT = Path(__file__).parent.parent
CHROMIUM = "/usr/bin/chromium"
SCREENSHOTS = ROOT / "build" / "screenshots"  # for people to look at
MODELS = ("fashion-teacher", "fashion-student", "fashion-tuned")
needs_chromium = pytest.mark.skipif(not os.path.exists(CHROMIUM), reason=f"no {CHROMIUM}: apt-get install chromium")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def serving(*models, cwd):
    """`marval serve` in a process of its own: its address and the process."""
    port = free_port()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "GRADIO_TEMP_DIR": str(cwd)}
    command = [*MARVAL, "serve", *models, "--port", str(port), "--device", "cpu"]
    log = (cwd / "log.txt").open("w")
    process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            if "marval is on" in (cwd / "log.txt").read_text() or process.poll() is not None:
                break
            time.sleep(0.1)
        assert process.poll() is None, (cwd / "log.txt").read_text()
        yield f"http://127.0.0.1:{port}/", process
    finally:
        process.terminate()
        process.wait(timeout=30)
        log.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(cwd=tmp_path_factory.mktemp("serve")) as found:
        yield found


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


# ---- in a browser ----


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visitor(chromium, server):
    """Opens the page: `visitor(width, scheme)`. Afterwards its log holds no error, its requests no other host."""
    opened = []

    def open_page(width=1280, scheme="light"):
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page, errors, requests = context.new_page(), [], []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        context.on("request", lambda request: requests.append(request.url))
        page.set_default_timeout(20_000)
        page.goto(server[0])
        page.wait_for_selector("#mv-draw")
        opened.append((context, errors, requests))
        return page

    yield open_page
    for context, errors, requests in opened:
        context.close()
        assert not errors
        assert requests
        assert all(url.startswith((server[0], "data:", f"blob:{server[0]}")) for url in requests)


def tab(page, name):
    page.get_by_role("tab", name=name).first.click()


def slide(page, label, value):
    """Type a number beside a slider of the open tab."""
    box = page.get_by_label(f"number input for {label}").locator("visible=true").first
    box.fill(str(value))
    box.press("Tab")


def shoot(page, name):
    """A screenshot of the whole page; nothing may be wider than the window."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@needs_chromium
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_generate_shows_the_iterations_as_they_come(visitor, width, scheme, tmp_path):
    page = visitor(width, scheme)
    dark = page.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).every(c => c < 90)"
    )
    assert dark == (scheme == "dark")
    page.evaluate("""() => {
      window.seen = [];
      new MutationObserver(() => document.querySelectorAll('.mv-growing figcaption').forEach((c) => {
        const told = c.textContent.match(/iteration \\d+/); if (told) window.seen.push(told[0]);
      })).observe(document.body, {childList: true, subtree: true});
    }""")
    slide(page, "Pictures of each model", 2)
    slide(page, "Iterations K", 6)
    page.click("#mv-draw")
    page.wait_for_selector(".mv-status:has-text('Done. Time of a picture')")
    seen = [int(told.split()[1]) for told in dict.fromkeys(page.evaluate("window.seen"))]
    assert len(seen) >= 3
    assert page.locator("#mv-generated .mv-panel").count() == 3
    assert page.locator("#mv-generated .mv-pictures img").count() == 6
    assert page.locator("#mv-generated .mv-strip img").count() == 18
    speeds = page.locator("#mv-generated .mv-speed").all_inner_texts()
    assert len(speeds) == 2
    assert all(int(told.split("×")[0]) > 2 for told in speeds)
    picture = page.locator("#mv-generated .mv-picture img").first
    assert picture.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    assert picture.bounding_box()["width"] >= 120
    shoot(page, f"generate-{width}-{scheme}")

    with page.expect_download() as download:
        page.locator("#mv-generated").get_by_role("link", name="Save").first.click()
    download.value.save_as(tmp_path / "a.png")
    recipe = read_recipe(tmp_path / "a.png")[0]
    assert (recipe.model, recipe.class_name, recipe.seed, recipe.iterations) == ("fashion-teacher", "sneaker", 0, 6)
    assert recipe.guidance == 3.0
    result = marval("sample", "--like", "a.png", "--out", "again", cwd=tmp_path)
    assert "the same, pixel for pixel" in result.stdout, result.stdout + result.stderr

    page.locator("#mv-generated").get_by_role("button", name="Edit").nth(3).click()
    page.wait_for_selector("#mv-painter [data-token]")
    assert page.locator("#mv-painter img").is_visible()


@needs_chromium
@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light")])
def test_edit_redraws_what_is_painted(visitor, width, scheme, tmp_path):
    page = visitor(width, scheme)
    tab(page, "Edit")
    page.click("#mv-start")
    page.wait_for_selector("#mv-painter [data-token]")
    page.wait_for_selector("text=Now paint")

    def save(name):
        with page.expect_download() as download:
            page.get_by_role("link", name="Save this picture").click()
        download.value.save_as(tmp_path / name)
        return np.asarray(Image.open(tmp_path / name)).reshape(7, 4, 7, 4)

    before = save("before.png")
    cells = page.locator("#mv-painter [data-token]")
    cells.nth(48).scroll_into_view_if_needed()
    start, end = cells.nth(14).bounding_box(), cells.nth(17).bounding_box()
    page.mouse.move(start["x"] + 5, start["y"] + 5)
    page.mouse.down()
    page.mouse.move(end["x"] + 5, end["y"] + 5, steps=12)
    page.mouse.up()
    assert page.inner_text("#mv-painter output") == "4 of 49 tokens painted"
    cells.nth(0).focus()  # and by the keyboard: down, right, press
    for key in ("ArrowDown", "ArrowRight", "Space"):
        page.keyboard.press(key)
    assert cells.nth(8).get_attribute("aria-pressed") == "true"
    shoot(page, f"edit-{width}-{scheme}")
    page.click("#mv-redraw")
    page.wait_for_selector("text=5 tokens redrawn, the other 44 bit-identical")
    after = save("after.png")
    changed = {row * 7 + column for row, _, column, _ in np.argwhere(before != after)}
    assert changed
    assert changed <= {8, 14, 15, 16, 17}
    result = marval("sample", "--like", "after.png", "--out", "again", cwd=tmp_path)
    assert "the same, pixel for pixel" in result.stdout, result.stdout + result.stderr

    page.click("#mv-vary")
    page.wait_for_selector("text=Done: 6 variations")
    assert page.locator("#mv-varied img").count() == 6
    shoot(page, f"vary-{width}-{scheme}")
    page.locator("#mv-varied").get_by_role("button", name="Edit").nth(1).click()
    page.wait_for_selector("text=This variation is the picture now")
    page.click("#mv-undo")
    page.wait_for_selector("text=Taken back")
    assert np.array_equal(save("undone.png"), after)


@needs_chromium
def test_uploads_good_and_bad(visitor, tmp_path):
    page = visitor()
    tab(page, "Edit")

    def upload(name, file):
        (tmp_path / name).write_bytes(file)
        with page.expect_file_chooser() as chooser:
            page.click("#mv-upload")
        chooser.value.set_files(tmp_path / name)

    for name, (file, message) in zip(
        ("text.png", "still.gif", "bomb.png"), (BAD_FILES[0], BAD_FILES[5], BAD_FILES[8]), strict=True
    ):
        upload(name, file)
        page.wait_for_selector(f".toast-body:has-text('{message}')")
        page.locator(".toast-close").first.click()
    upload("large.png", bytes(5_500_000))
    page.wait_for_selector(".toast-body")
    page.locator(".toast-close").first.click()
    upload("good.jpg", content(photo((300, 200)), "JPEG"))
    page.wait_for_selector("text=encoded once")
    assert page.locator("#mv-painter [data-token]").count() == 49


@needs_chromium
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_compare_and_count(visitor, width, scheme):
    page = visitor(width, scheme)
    tab(page, "Compare")
    for k in ("16", "8"):
        page.get_by_label(k, exact=True).locator("visible=true").first.uncheck()
    page.click("#mv-compare")
    page.wait_for_selector("text=Done: 9 pictures of one seed")
    assert page.locator("#mv-compared img").count() == 9
    assert page.locator(".mv-plot circle").count() == 15
    assert page.locator(".mv-table tbody tr").count() >= 4
    shoot(page, f"compare-{width}-{scheme}")

    tab(page, "Why?")
    slide(page, "Iterations K", 3)
    page.click("#mv-race")
    page.wait_for_selector("text=fashion-teacher 300 calls of the head")
    counts = page.locator("#mv-loops .mv-count").all_text_contents()
    assert counts == ["6", "300", "3", "3", "3", "3"]
    shoot(page, f"why-{width}-{scheme}")


@needs_chromium
def test_a_seed_out_of_range_cannot_be_sent_and_keys_are_enough(visitor):
    page = visitor()
    slide(page, "Seed", 10**7)
    assert int(page.get_by_label("number input for Seed").locator("visible=true").first.input_value()) <= 999_999
    slide(page, "Seed", 5)
    slide(page, "Pictures of each model", 1)
    for name in MODELS[::2]:
        page.get_by_label(name).locator("visible=true").first.uncheck()
    page.locator("#mv-draw").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".mv-status:has-text('Done. Time of a picture: fashion-student')")
    assert page.locator("#mv-generated .mv-pictures img").count() == 1
    assert "seed 5" in page.inner_text("#mv-generated figcaption")
