"""A folder with small models and pictures for the command line."""

import pytest

from marval.io.checkpoint import save_model
from pictures import make_pictures
from tiny import tiny_config, tiny_model


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny teacher and pictures of three classes, below a folder with a space and letters beyond ASCII."""
    root = tmp_path_factory.mktemp("odd") / "Ménage à trois 画"
    save_model(root / "tiny", tiny_model(), tiny_config())
    make_pictures(root / "pictures", ("apple", "pear", "fig"), 8, (20, 18))
    make_pictures(root / "shapes", ("cross", "square"), 4, grey=True)
    return root
