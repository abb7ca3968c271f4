"""Folders of pictures."""

import numpy as np
from PIL import Image


def make_pictures(folder, classes, count, size=(8, 8), grey=False):
    """Noise: `count` pictures for each class, below `folder`."""
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            array = rng.integers(0, 255, (size[1], size[0]) + (() if grey else (3,)), dtype=np.uint8)
            Image.fromarray(array).save(folder / name / f"{i}.png")
