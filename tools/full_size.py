"""Time MAR-B with random weights on this machine.

python tools/full_size.py speed K [RESULTS]: seconds of one guided image (T = 100) by the official loop in plain
PyTorch, by our teacher and by our student.

python tools/full_size.py cached K [RESULTS]: seconds of four images by a student, and by one that reads a token once.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Literal

import torch

from marval.cli.options import run_script
from marval.config import Chain, Count, MARConfig
from marval.evaluate.results import read_results, write_results
from marval.evaluate.speed import seconds_of
from marval.io.files import check_output
from marval.model import MAR
from marval.runtime.provenance import made_by
from marval.runtime.rng import generator
from marval.sampling import DrawByChain, DrawInOneStep, sample

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
from straightforward import straightforward

CPU = torch.device("cpu")


def main(stage: Literal["speed", "cached"], count: Count, out: Path | None = None) -> None:
    """Print the figures of a stage, and keep them.

    Args:
        stage: what is timed.
        count: K.
        out: a JSON file; a row of the same stage and K is replaced.
    """
    if out is not None:
        check_output(out, folder=False)
    figures = {"speed": speed, "cached": cached}[stage](count)
    print(json.dumps(figures), flush=True)
    if out is not None:
        rows = read_results(out).get("full-size", [])
        others = [row for row in rows if (row["stage"], row["count"]) != (stage, count)]
        row = {"stage": stage, "count": count, **figures, "made": made_by(CPU)}
        write_results(out, "full-size", sorted([*others, row], key=lambda row: (row["stage"], row["count"])))


def speed(iterations):
    mar = MARConfig.imagenet256("base")
    model = MAR(mar).initialize(generator(0, "full size")).eval().requires_grad_(False)
    chain, labels = Chain(guidance=3.0), torch.tensor([0])

    def ours(draw):
        with torch.inference_mode():
            return sample(model, draw, model.embed(labels), iterations=iterations, seeds=[0])

    jobs = {
        "student": lambda: ours(DrawInOneStep()),
        "teacher": lambda: ours(DrawByChain(chain)),
        "straightforward": lambda: straightforward(model, chain, labels, iterations, [0]),  # plain PyTorch products
    }
    jobs["student"]()  # warms up
    return {name: seconds_of(job, CPU) for name, job in jobs.items()}


def cached(iterations, batch=4):
    mar = MARConfig.imagenet256("base")
    model = MAR(mar).initialize(generator(0, "full size")).eval().requires_grad_(False)
    labels = torch.arange(batch)

    def drawn(name, k):
        model.config = dataclasses.replace(mar, cached=name == "cached")
        with torch.inference_mode():
            return sample(model, DrawInOneStep(), model.embed(labels), iterations=k, seeds=range(batch))

    seconds = {}
    for name in ("cached", "student", "cached again"):  # a machine that is busy for a while shows
        drawn(name.split()[0], 1)  # warms up
        seconds[name] = seconds_of(lambda name=name: drawn(name.split()[0], iterations), CPU)
    return {"batch": batch, **seconds}


if __name__ == "__main__":
    run_script(main)
