"""The 1000 classes of ImageNet (ILSVRC 2012): WordNet ids and readable names, in the order of their numbers."""

import functools
from importlib.resources import files


@functools.cache
def imagenet_classes() -> dict[str, str]:
    """WordNet id to name, such as "n01440764" to "tench"; the id that sorts first is class 0.

    The names are WordNet's first lemmas, made unique ("crane" is two classes).
    """
    text = (files("marval") / "assets" / "imagenet-classes.tsv").read_text()
    return dict(line.split("\t") for line in text.splitlines())
