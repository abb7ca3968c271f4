"""Numbers recorded from the official MAR code, with a trained tiny model."""

from pathlib import Path

from safetensors.torch import load_file

from marval.config import MARConfig
from marval.model import MAR

FILE = Path(__file__).parents[1] / "golden/mar_tiny_reference.safetensors"


def recorded_numbers(device="cpu"):
    """Name to tensor."""
    return load_file(FILE, device=str(device))


def recorded_model(numbers):
    """The tiny model of the numbers, on their device."""
    config = MARConfig(
        (4, 4), 16, 10,
        encoder_dim=32, encoder_depth=2, encoder_heads=4, decoder_dim=32, decoder_depth=2, decoder_heads=4,
        head_width=32, head_depth=2, buffer_size=4,
    )  # fmt: skip
    model = MAR(config).to(numbers["z"].device)
    model.load_state_dict({k.removeprefix("weights."): v for k, v in numbers.items() if k.startswith("weights.")})
    return model.eval().requires_grad_(False)
