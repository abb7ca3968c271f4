"""Fixtures of the page's and the recipes' tests."""

import pytest

from marval.io.checkpoint import save_model
from tiny import tiny_config, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a tiny teacher."""
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, tiny_model(), tiny_config())
    return folder
