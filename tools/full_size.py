"""Time MAR-B with random weights on this machine; figures are printed and, with RESULTS, kept in that JSON file.

python tools/full_size.py speed K [RESULTS]: seconds of one guided image (T = 100) by the official loop in plain
PyTorch, by our teacher and by our student.

python tools/full_size.py cached K [RESULTS]: seconds of four images by a student, and by one that reads a token once.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch

from marval.config import Chain, MARConfig
from marval.evaluate.results import read_results, write_results
from marval.evaluate.speed import seconds_of
from marval.model import MAR
from marval.runtime.provenance import made_by
from marval.runtime.rng import generator
from marval.sampling import DrawByChain, DrawInOneStep, sample

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
from straightforward import straightforward

CPU = torch.device("cpu")


def report(figures):
    """Print the figures of this command, and keep them."""
    print(json.dumps(figures), flush=True)
    if len(sys.argv) > 3:
        out, stage, count = Path(sys.argv[3]), sys.argv[1], int(sys.argv[2])
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
    report({name: seconds_of(job, CPU) for name, job in jobs.items()})


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
    report({"batch": batch, **seconds})


if __name__ == "__main__":
    {"speed": speed, "cached": cached}[sys.argv[1]](int(sys.argv[2]))
