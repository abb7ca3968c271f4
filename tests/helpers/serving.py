"""A page that is served, and the browser that visits it."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import httpx
import pytest

from processes import python

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"  # for people to look at


@contextlib.contextmanager
def in_thread(studio, host="127.0.0.1", auth=None):
    """A page of a studio, served by this process: its address."""
    import uvicorn

    from marval.page.guard import Guard
    from marval.page.server import build, listen

    with listen(host, 0) as listening:
        app = Guard(build(studio), host, auth)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        finally:
            server.should_exit = server.force_exit = True
            thread.join(timeout=30)


@contextlib.contextmanager
def serving(*models, cwd, **environment):
    """`marval serve` in a process of its own, which writes log.txt: its address and the process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment}
    command = python(1, "-m", "marval", "serve", *models, "--port", 0, "--device", "cpu")
    with (cwd / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        while not (address := re.search(r"marval is on (\S+)", (cwd / "log.txt").read_text())):
            assert process.poll() is None, (cwd / "log.txt").read_text()
            time.sleep(0.1)
        yield address[1], process
    finally:
        process.terminate()
        process.wait(timeout=30)


def ask(address, *pictures, **options):
    """Ask for pictures: the events of the answer, or its status and error."""
    options = {"timeout": 60, **options}
    with httpx.stream("POST", address + "draw", json={"pictures": pictures}, **options) as answer:
        if answer.status_code == 200:
            return [json.loads(line) for line in answer.iter_lines()]
        answer.read()
        return answer.status_code, answer.json()["error"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Bundled models, served: the address and the process. What visitors do leaves no stack trace behind."""
    folder = tmp_path_factory.mktemp("serve")
    with serving("fashion-teacher", "fashion-student", "fashion-tuned", cwd=folder) as found:
        yield found
    assert "Traceback" not in (folder / "log.txt").read_text()


@pytest.fixture(scope="module")
def chromium():
    if not os.path.exists(CHROMIUM):
        pytest.skip(f"no {CHROMIUM}: apt-get install chromium, or name it by CHROMIUM")
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
        page.set_default_timeout(30_000)
        page.goto(server[0])
        page.wait_for_selector("[data-ready]")
        opened.append((context, errors, requests))
        return page

    yield open_page
    for context, errors, requests in opened:
        context.close()
        assert [error for error in errors if "status of 400" not in error] == []  # a refusal, which the page shows
        assert requests
        assert all(url.startswith((server[0], "data:", f"blob:{server[0]}")) for url in requests)


def slide(page, form, label, value):
    """Type a number beside a slider."""
    box = page.locator(f"#{form}").get_by_label(f"{label}, as a number").first
    box.fill(str(value))
    box.press("Tab")


def finish(page, form, words):
    """Wait for the line of a form to say something."""
    page.wait_for_selector(f"#{form} .status:has-text('{words}')")


def shoot(page, name):
    """A screenshot of the whole page; nothing may be wider than the window."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
