"""Measure how far students' tokens are from their teacher's in the same contexts, by the energy distance.

    python tools/token_gap.py TEACHER STUDENT [STUDENT ...] --data fashion-mnist --guidance 1.25 --out token-gap.json

A Fréchet distance of pictures mixes what one call draws with what the iterations make of it. This is about one call:
every context of `--images` real images has `--samples` tokens of the teacher's whole chain and as many of the student.
The distance `2 E|x - y| - E|x - x'| - E|y - y'|` (0: the same distribution) is told as a share of the teacher's own
spread `E|y - y'|`, with the gap of the means and the ratio of the standard deviations.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

import marval
from marval.cli.options import run_script
from marval.data import TrainingData, load_data
from marval.io.files import check_output, write_text
from marval.pipeline import Pipeline
from marval.runtime.provenance import made_by
from marval.runtime.rng import generator
from marval.sampling import draw_function
from marval.train.distill import Inputs, student_tokens, target_contexts

TARGETS = 6  # hidden tokens of each image


def mean_distance(x: Float[Tensor, "s n c"], y: Float[Tensor, "t n c"]) -> Float[Tensor, " n"]:
    """`E|x - y|` of every token; of samples with themselves, without the pairs that are one sample."""
    distances = torch.cdist(x.transpose(0, 1), y.transpose(0, 1)).sum((1, 2))
    return distances / (len(x) * (len(x) - 1) if x is y else len(x) * len(y))


def gap(teacher: Float[Tensor, "s n c"], student: Float[Tensor, "s n c"]) -> dict[str, float]:
    """The figures of one number of visible tokens, over all its contexts."""
    spread = mean_distance(teacher, teacher)
    distance = 2 * mean_distance(teacher, student) - spread - mean_distance(student, student)
    deviation = [x.var(0).mean().sqrt() for x in (student, teacher)]
    means = (teacher.mean(0) - student.mean(0)).square().mean().sqrt()
    return {
        "energy distance / spread": (distance.mean() / spread.mean()).item(),
        "gap of means / deviation": (means / deviation[1]).item(),
        "ratio of deviations": (deviation[0] / deviation[1]).item(),
    }


@torch.inference_mode()
def token_gaps(
    teacher: Pipeline, students: dict[str, Pipeline], data: TrainingData, guidance: float,
    visible: Sequence[int], images: int, samples: int, seed: int,
) -> dict[str, dict[str, dict[str, float]]]:  # fmt: skip
    """The figures of every student, and of the teacher drawing again, for each number of visible tokens."""
    teacher, mar = teacher.with_draw(guidance=guidance), teacher.config.mar
    rng, keys = generator(seed, "token gap"), torch.arange(images)
    chosen = torch.randperm(len(data), generator=rng)[:images]
    tokens, labels = data.tokens(data.read(chosen, keys), keys, teacher.space), data.labels[chosen]
    gaps: dict[str, dict[str, dict[str, float]]] = {name: {} for name in ["the teacher again", *students]}
    for count in visible:
        order = torch.rand(images, mar.num_tokens, generator=rng).argsort(1)
        inputs = Inputs(tokens, order[:, :count], order[:, count : count + TARGETS], labels)

        def drawn(pipeline: Pipeline, inputs: Inputs = inputs) -> Tensor:
            draw, model = draw_function(pipeline.config), pipeline.model
            shape, bound = (draw.noise_draws, inputs.targets.numel(), mar.token_dim), draw.bind(model.head)
            noise = [torch.randn(shape, generator=rng) for _ in range(samples)]
            if model.config.joint_draw:  # every sample has a context of its own
                return torch.stack([student_tokens(model, draw, inputs, guidance, z[0], False)[0] for z in noise])
            contexts = target_contexts(model, inputs, guided=draw.needs_null, autocast=False)
            return torch.stack([bound(contexts, guidance, z) for z in noise])

        expected = drawn(teacher)
        for name, pipeline in {"the teacher again": teacher, **students}.items():
            gaps[name][f"{count} visible"] = gap(expected, drawn(pipeline))
            print(
                name, count, {key: round(value, 3) for key, value in gaps[name][f"{count} visible"].items()}, flush=True
            )
    return gaps


def main(
    teacher: str,
    students: tuple[str, ...],
    *,
    data: str = "",
    guidance: float = 1.0,
    visible: tuple[int, ...] = (0, 5, 20),
    images: int = 32,
    samples: int = 32,
    seed: int = 0,
    out: Path = Path("token-gap.json"),
) -> None:
    """Measure the gaps, and keep them in a JSON file.

    Args:
        teacher: a bundled model, or a model's or run's folder.
        students: likewise, of this teacher.
        data: the real images, as marval train takes them; the teacher's own when left out.
        guidance: w of the teacher, and of students that take it.
        visible: how many tokens are known.
        images: real images, each a context for every number of known tokens.
        samples: tokens that each model draws in each context.
        seed: of images, masks and noise.
        out: the JSON file.
    """
    settings = {name: value for name, value in locals().items() if name != "out"}
    check_output(out, folder=False)
    if len({Path(name).name for name in students}) < len(students):
        raise ValueError(f"{', '.join(students)}: expected models of different names")
    guide = marval.load(teacher)
    settings |= {"students": [Path(name).name for name in students], "data": data or guide.config.data}
    pipelines = {Path(name).name: marval.load(name) for name in students}
    gaps = token_gaps(guide, pipelines, load_data(data or guide.config.data), guidance, visible, images, samples, seed)
    report = {"settings": settings, **made_by(torch.device("cpu")), "gaps": gaps}
    write_text(out, json.dumps(report, indent=1, default=str))


if __name__ == "__main__":
    run_script(main)
