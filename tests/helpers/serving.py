"""A real `marval serve`, and the browser that visits it, for the tests of the page."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from processes import MARVAL

ROOT = Path(__file__).parents[2]
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
SCREENSHOTS = ROOT / "build" / "screenshots"  # for people to look at
MODELS = ("fashion-teacher", "fashion-student", "fashion-tuned")
needs_chromium = pytest.mark.skipif(
    not os.path.exists(CHROMIUM), reason=f"no {CHROMIUM}: apt-get install chromium, or name it by CHROMIUM"
)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def serving(*models, cwd, script=None, **environment):
    """`marval serve`, or a script that calls it, in a process of its own, which writes log.txt: its address and the
    process."""
    port = free_port()
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "GRADIO_TEMP_DIR": str(cwd), **environment,
    }  # fmt: skip
    command = [
        *([sys.executable, "-c", script] if script else MARVAL),
        "serve",
        *models,
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
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
def serve_folder(tmp_path_factory):
    """Where the server runs; its log.txt is there."""
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def server(serve_folder):
    """The bundled models, served: the address and the process. What visitors send leaves no stack trace behind."""
    with serving(cwd=serve_folder) as found:
        yield found
    assert "Traceback" not in (serve_folder / "log.txt").read_text()


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

    def open_page(width=1280, scheme="light", expected=()):
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page, errors, requests = context.new_page(), [], []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        context.on("request", lambda request: requests.append(request.url))
        page.set_default_timeout(20_000)
        page.goto(server[0])
        page.wait_for_selector("#mv-draw")
        opened.append((context, errors, requests, expected))
        return page

    yield open_page
    for context, errors, requests, expected in opened:
        context.close()
        assert [error for error in errors if not any(part in error for part in expected)] == []
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
