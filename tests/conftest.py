"""Fixtures shared by all tests. Shape annotations of the package are enforced here.

What pip does not install (the 60,000 images of Fashion-MNIST, Chromium) comes by a fixture, which skips the test where
it is missing. Those tests are marked `system`.
"""

import signal
import sys

import pytest
from jaxtyping import install_import_hook

install_import_hook("marval", "beartype.beartype")

from marval.cli import wait_passively  # noqa: E402

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a job in a shell's background; its children would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)
wait_passively()  # before torch is imported, here and in the processes that tests start

SYSTEM = {"fashion_train", "fashion_test", "chromium"}  # fixtures
pytest_plugins = ["commands", "serving", "texts", "workspace"]  # fixtures of commands, the page, and models of text


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if SYSTEM & set(getattr(item, "fixturenames", ())):
            item.add_marker("system")


@pytest.fixture(scope="session", autouse=True)
def _one_thread_per_worker():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_code_is_forgotten(tmp_path_factory):
    """A test's modules, which it wrote among its temporary files, are not found by the next one."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path_factory.getbasetemp())):
            del sys.modules[name]


def fashion_mnist(split):
    """Fashion-MNIST's images where they are on this machine (nothing is fetched), else the test is skipped."""
    from marval.data import load_fashion_mnist

    try:
        return load_fashion_mnist(split, fetch=False)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def fashion_train():
    """The 60,000 training images. Tests that need only some take `marval.data.load_fashion_sample`."""
    return fashion_mnist("train")


@pytest.fixture(scope="session")
def fashion_test():
    """The 10,000 test images."""
    return fashion_mnist("test")


@pytest.fixture(scope="session")
def reference():
    """Numbers recorded from the official MAR code, with a trained tiny model: name to tensor."""
    from recorded import recorded_numbers

    return recorded_numbers()


@pytest.fixture(scope="session")
def reference_model(reference):
    """The tiny model of the reference numbers."""
    from recorded import recorded_model

    return recorded_model(reference)
