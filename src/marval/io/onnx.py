"""Students as ONNX: the whole draw of K iterations as one graph, for programs without PyTorch."""

import contextlib
import io
import json
import logging
import warnings
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from marval.classes import label_names
from marval.config import Chain, ModelConfig, PixelSpace
from marval.io.files import atomic_folder
from marval.model import MAR
from marval.runtime.rng import generator
from marval.sampling import draw_counts, draw_function, sample
from marval.sampling.loop import Start, run
from marval.sampling.orders import random_orders
from marval.spaces import Pixels, unpatchify

TOLERANCE = 1e-4  # of the largest value, between the two programs


class Student(nn.Module):
    """A student's draw as a function of its class, noise and order."""

    def __init__(self, model: MAR, config: ModelConfig, iterations: int):
        super().__init__()
        self.model, self.config = model, config
        self.draw, self.counts = draw_function(config), draw_counts(config.mar.num_tokens, iterations)

    def forward(
        self, labels: Int[Tensor, " b"], noise: Float[Tensor, "b l c"], order: Int[Tensor, "b l"]
    ) -> Float[Tensor, "b c2 h w"]:
        """Draw images in [0, 1] where tokens are pixels, else the VAE's latents."""
        start = Start(torch.zeros_like(noise), order, 0, self.counts, noise[None])
        *_, (tokens, _) = run(self.model, self.draw, self.model.embed(labels), start)
        return self.picture(tokens)

    def picture(self, tokens: Float[Tensor, "b l c"]) -> Float[Tensor, "b c2 h w"]:
        """Return what the graph gives for drawn tokens."""
        space = self.config.space
        if isinstance(space, PixelSpace):
            return Pixels(space).decode(tokens)
        return unpatchify(tokens, space.token_grid, space.patch) / space.scale + space.shift


def export_onnx(model: MAR, config: ModelConfig, iterations: int, file: Path) -> float:
    """Write a student (on the CPU, in float32) for K = `iterations` as ONNX, and compare it with `sample`.

    Inputs: `labels` (b,) int64, `noise` (b, L, C) float32, `order` (b, L) int64, the positions in the order in which
    they are drawn. Output: `images` (b, channels, height, width) in [0, 1], or `latents` for the VAE.

    Returns:
        The largest difference, relative to the largest value.

    Raises:
        ValueError: a teacher, a bad K, packages that are missing, or a graph that draws something else.
    """
    if isinstance(config.draw, Chain):
        raise ValueError(
            f"{config.name or 'this model'} is a teacher, which calls its head {config.draw.diffusion_steps} times for "
            "each token: an ONNX graph would hold every call; distil it, and export the student"
        )
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"ONNX needs {error.name}: pip install onnx onnxscript onnxruntime") from error
    student = Student(model, config, iterations).eval()
    inputs, expected = trial(student)
    program = exported(student, inputs)
    program.model.metadata_props.update(
        model=config.name, iterations=str(iterations), class_names=json.dumps(label_names(config))
    )
    with atomic_folder(file.parent) as folder:
        partial = folder / file.name
        program.save(partial)  # weights of gigabytes lie beside it, in a file whose name it holds
        session = onnxruntime.InferenceSession(partial, providers=["CPUExecutionProvider"])
        images = torch.from_numpy(session.run(None, {name: t.numpy() for name, t in inputs.items()})[0])
        difference = float((images - expected).abs().max() / expected.abs().max())
        if not difference <= TOLERANCE:
            raise ValueError(f"{file}: onnxruntime draws other images than PyTorch (by {difference:.1g}): not written")
    return difference


@torch.no_grad()
def trial(student: Student, batch: int = 3) -> tuple[dict[str, Tensor], Tensor]:
    """Labels, noise and orders to try a student with, and what `sample` draws of them."""
    rng, mar = generator("onnx"), student.config.mar
    labels = torch.randint(mar.num_labels, (batch,), generator=rng)
    noise = torch.randn(batch, mar.num_tokens, mar.token_dim, generator=rng)
    order = random_orders(mar.token_grid, range(batch))
    tokens = sample(
        student.model, student.draw, student.model.embed(labels), iterations=len(student.counts), seeds=0,
        orders=order, noise=noise[None],
    )  # fmt: skip
    return {"labels": labels, "noise": noise, "order": order}, student.picture(tokens)


def exported(student: Student, inputs: dict[str, Tensor]) -> torch.onnx.ONNXProgram:
    """The program of a student, for any batch; so the networks read it off `x.shape[0]`: `len(x)` would fix it."""
    name = "images" if student.config.space.kind == "pixels" else "latents"
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of a torchvision that is not needed
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")  # of deprecations inside torch
        program = torch.onnx.export(
            student, kwargs=inputs, dynamo=True, dynamic_shapes={each: {0: "batch"} for each in inputs}, verbose=False,
            input_names=list(inputs), output_names=[name],
        )  # fmt: skip
    assert program is not None  # with dynamo=True it never is
    return program
