"""Fixtures shared by all tests. Shape annotations of the package are enforced here."""

from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook("marval", "beartype.beartype")

pytest_plugins = ["serving"]  # fixtures of the page's tests
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session", autouse=True)
def _one_thread_per_worker():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def reference():
    """Numbers recorded from the official MAR code, with a trained tiny model: name to tensor."""
    from safetensors.torch import load_file

    return load_file(GOLDEN / "mar_tiny_reference.safetensors")


@pytest.fixture(scope="session")
def reference_model(reference):
    """The tiny model of the reference numbers."""
    from marval.config import MARConfig
    from marval.model import MAR

    config = MARConfig(
        (4, 4), 16, 10,
        encoder_dim=32, encoder_depth=2, encoder_heads=4, decoder_dim=32, decoder_depth=2, decoder_heads=4,
        head_width=32, head_depth=2, buffer_size=4,
    )  # fmt: skip
    model = MAR(config)
    weights = {k.removeprefix("weights."): v for k, v in reference.items() if k.startswith("weights.")}
    model.load_state_dict(weights, strict=True)
    return model.eval().requires_grad_(False)
