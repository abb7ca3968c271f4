"""marval: masked auto-regressive diffusion in one step (MARVAL, CVPR 2026).

student = marval.load("emoji-student")
images = student.sample(["a taxi, 3-D style", "pizza"], seed=0)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from marval.io.find import bundled_models
    from marval.pipeline import Pipeline, load
    from marval.sampling.loop import sample

__all__ = ["Pipeline", "bundled_models", "load", "sample"]
__version__ = "0.1.0"
_PLACES = {"sample": "sampling.loop", "bundled_models": "io.find"}  # others: pipeline


def __getattr__(name: str) -> Any:
    """Import torch and the rest only when they are asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'marval' has no attribute {name!r}")
    return getattr(importlib.import_module(f"marval.{_PLACES.get(name, 'pipeline')}"), name)
