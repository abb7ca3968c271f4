"""`marval study rl`: what each setting of reward tuning does to reward, held-out reward, distance and diversity.

A small grid of runs from one student. No run stops early: the whole way is measured, and what early stopping would
have kept is read off it afterwards, by the same rule that `marval finetune` stops by.
"""

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from marval.config import FinetuneConfig
from marval.evaluate.images import draw_bytes
from marval.evaluate.judge import Judge
from marval.evaluate.results import markdown, read_results, write_results
from marval.evaluate.rewards import mean_and_error, reward_values
from marval.io.files import atomic_path, write_text
from marval.io.images import grid, save_picture
from marval.pipeline import Pipeline
from marval.provenance import made_by
from marval.rewards import Reward
from marval.train.finetune import Anchor, Keeper, finetune
from marval.train.run import LOG

GAIN = 0.2  # of the student's held-out log-probability, at which runs are compared
SHOWN = 10  # images in a row of the pictures
OLD_ANCHOR = (  # of rows that do not say which w it had
    "**What `anchor: teacher` measured**: a pull towards the teacher at its own guidance, w = 3, and not to where the "
    "student was distilled to (1.6, the mean of its three parts), for 64 images a step. Today's `--anchor` takes the w "
    "that the student records and as many images as the tuning: that anchor has not been measured. The other rows are "
    "as they would be today, but for bf16: they were computed in float32 throughout (`--no-autocast`)."
)
NEVER: dict[str, Any] = {"max_distance_ratio": math.inf, "min_diversity_ratio": 0.0, "patience": 10**9}


@dataclass(frozen=True)
class Run:
    """One run of the grid: how it differs from the base settings, and why it is there."""

    name: str
    changes: Mapping[str, Any]
    why: str


def rl_grid(base: FinetuneConfig) -> list[Run]:
    """The runs: gradients through every iteration without an anchor ("plain"), then one change each, or two."""
    plain: dict[str, Any] = {"backprop_iterations": base.sample_iterations, "anchor": 0.0}
    half, rate = max(1, base.sample_iterations // 2), base.learning_rate
    anchored = {"anchor": 1.0, "iterations": base.iterations + base.anchor_warmup}
    runs = [
        Run("plain", {}, "gradients through every iteration, no anchor"),
        Run("M=1", {"backprop_iterations": 1}, "gradients through the last iteration only"),
        Run(f"M={half}", {"backprop_iterations": half}, "gradients through the last half of the iterations"),
        Run("head", {"train": "head"}, "only the token head learns"),
        Run("low-rank", {"train": "low-rank", "learning_rate": 20 * rate},
            f"factors of rank {base.rank}, at 20 times the learning rate"),
        Run("normalized", {"normalize": True}, "the reward in units of its deviation on the student's images"),
        Run("hinge", {"normalize": True, "hinge": 0.0}, "images above the student's mean push no further"),
        Run("anchor: teacher", {**anchored, "anchor_to": "teacher"}, "GSIM loss against the guided teacher"),
        Run("anchor: student", {**anchored, "anchor_to": "student"}, "score gap to the frozen student (DI*)"),
        Run("faster", {"learning_rate": 4 * rate}, "4 times the learning rate"),
        Run("M=1 longer", {"backprop_iterations": 1, "iterations": 2 * base.iterations}, "M=1 for twice as long"),
        Run("M=1 faster", {"backprop_iterations": 1, "learning_rate": 4 * rate}, "M=1 at 4 times the learning rate"),
        Run("hacked", {"learning_rate": 20 * rate}, "20 times the learning rate, nothing that holds it"),
    ]  # fmt: skip
    once = {run.name: run for run in runs}.values()  # at small K, half the iterations is one
    return [dataclasses.replace(run, changes={**plain, **run.changes}) for run in once]


def place_of(folder: Path, run: str) -> Path:
    """The folder of a run."""
    return folder / run.replace(": ", "-").replace("=", "-")


def kept_of(curve: Sequence[dict[str, float]], settings: FinetuneConfig) -> tuple[int, str]:
    """Which row of a curve early stopping keeps, and why it stops ("" where it does not)."""
    keeper, kept = Keeper(settings), 0
    for i, figures in enumerate(curve):
        if keeper.see(figures):
            kept = i
        if keeper.stopped:
            break
    return kept, keeper.stopped


def study_rl(
    student: Pipeline,
    sha256: str,
    reward: Reward,
    reward_name: str,
    held_out: Mapping[str, Reward],
    judge: Judge,
    base: FinetuneConfig,
    runs: Sequence[Run],
    anchor: Anchor,
    folder: Path,
    out: Path,
    *,
    samples: int,
    quiet: bool = False,
    report: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Run the grid and keep every run in `out` as soon as it is done; runs that are there already are not repeated.

    Args:
        sha256: of the student's weights.
        reward: what is optimised; its name and weights as they were typed are `reward_name`.
        held_out: rewards that are only watched.
        folder: of the runs, emptied as they start; each leaves its pictures there.
        samples: images that each row of a curve stands for, on fixed seeds.
    """
    rows = read_results(out).get("study", {}).get("rows", [])
    for run in runs:
        settings = dataclasses.replace(base, **run.changes)
        told = {k: v for k, v in dataclasses.asdict(settings).items() if k not in NEVER}
        key: dict[str, Any] = {"run": run.name, "student": student.config.name, "sha256": sha256, "reward": reward_name}
        key |= {"samples": samples, "settings": told}
        place = place_of(folder, run.name)
        if any(all(row.get(name) == value for name, value in key.items()) for row in rows):
            continue
        shutil.rmtree(place, ignore_errors=True)
        curve: list[dict[str, float]] = []
        pictures: list[Tensor] = []
        watch = watcher(reward, held_out, judge, settings, samples, curve, pictures)
        began = time.monotonic()
        finetune(
            student.model, student.config, reward, dataclasses.replace(settings, **NEVER), place,
            probe=watch, anchor=anchor if settings.anchor else None, quiet=quiet,
        )  # fmt: skip
        seconds = time.monotonic() - began
        log = [json.loads(line) for line in (place / LOG).read_text().splitlines()]
        waited = settings.anchor_warmup if settings.anchor else 0  # steps in which phi alone learns
        for figures, step in zip(curve, (line["step"] for line in log if "fd" in line), strict=True):
            figures["step"] = max(0, step - waited)
        kept, stopped = kept_of(curve, settings)
        names = [f"step {int(curve[i]['step'])}" for i in (0, kept, len(curve) - 1)]
        labels = [f"before\n{names[0]}", f"kept\n{names[1]}", f"end\n{names[2]}"]
        save_picture(place / "pictures.png", grid([pictures[i] for i in (0, kept, -1)], labels, title=run.name))
        rows = [row for row in rows if row["run"] != run.name]
        found = {
            "why": run.why,
            "anchor_guidance": anchor.settings.guidance,
            "seconds": seconds,
            "curve": curve,
            "kept": kept,
            "stopped": stopped,
        }
        rows.append({**key, **found, "made": made_by(student.device)})
        write_results(out, "study", rows, base.seed)
        report(f"{run.name}: {summary(rows[-1])}")
    return rows


def watcher(
    reward: Reward,
    held_out: Mapping[str, Reward],
    judge: Judge,
    settings: FinetuneConfig,
    samples: int,
    curve: list[dict[str, float]],
    pictures: list[Tensor],
) -> Callable[[Pipeline], dict[str, float]]:
    """A probe that puts its figures into `curve` and the first images into `pictures`."""

    def watch(pipeline: Pipeline) -> dict[str, float]:
        images, labels = draw_bytes(pipeline, samples, settings.sample_iterations, seed=0)
        found = judge.figures(images, labels)
        rewards = {"tuned reward": reward, **held_out}
        values = reward_values(
            rewards, images, labels, pipeline.config.class_names, settings.prompt, device=pipeline.device
        )
        found |= {name: mean_and_error(one)["mean"] for name, one in values.items()}
        curve.append({name: float(f"{value:.6g}") for name, value in found.items()})
        pictures.append(images[:SHOWN].float() / 255)
        return dict(found)

    return watch


def ratios(row: dict[str, Any], i: int) -> tuple[float, float]:
    """Fréchet distance and diversity of a curve's row, over the student's."""
    first, there = row["curve"][0], row["curve"][i]
    return there["fd"] / first["fd"], there["diversity"] / first["diversity"]


def summary(row: dict[str, Any]) -> str:
    """One run in a line."""
    curve, kept = row["curve"], row["kept"]
    distance, diversity = ratios(row, kept)
    last_distance, last_diversity = ratios(row, -1)
    return (
        f"tuned reward {curve[0]['tuned reward']:.4g} -> {curve[kept]['tuned reward']:.4g} at step "
        f"{int(curve[kept]['step'])} (FD x{distance:.3f}, diversity x{diversity:.3f}) -> "
        f"{curve[-1]['tuned reward']:.4g} at the end (FD x{last_distance:.3f}, diversity x{last_diversity:.3f})"
    )


def price(row: dict[str, Any]) -> tuple[float, float] | None:
    """Ratios of Fréchet distance and diversity where the held-out log-probability has risen by `GAIN`.

    Interpolated between measurements; None where it never rises so far.
    """
    curve = row["curve"]
    scores = [figures["log_probability"] for figures in curve]
    goal = scores[0] + GAIN * abs(scores[0])
    for i in range(1, len(curve)):
        if scores[i] >= goal:
            share = (goal - scores[i - 1]) / (scores[i] - scores[i - 1])
            before, after = ratios(row, i - 1), ratios(row, i)
            distance, diversity = (a + share * (b - a) for a, b in zip(before, after, strict=True))
            return distance, diversity
    return None


def cheapest_run(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The run that buys the held-out gain with the least Fréchet distance; None where none reaches it."""
    prices = [(cost[0], i) for i, row in enumerate(rows) if (cost := price(row)) is not None]
    return rows[min(prices)[1]] if prices else None


def furthest_run(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run whose end is furthest from the student: highest Fréchet distance."""
    return max(rows, key=lambda row: ratios(row, -1)[0])


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """The trade-off curves: tuned and held-out reward against distance and diversity; a dot where a run is stopped.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ValueError("the plot needs matplotlib: pip install matplotlib") from error
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), sharex="col", sharey="row")
    ticks = [1, 1.1, 1.2, 1.5, 2, 3, 4]
    axes[1, 0].set_xscale("log")  # a run that runs away would squeeze the others
    axes[1, 0].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[1, 0].minorticks_off()
    axes[1, 1].invert_xaxis()  # to the right is worse, as for distance
    for number, row in enumerate(rows):
        style = {"linewidth": 1, "color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}
        x = [[ratios(row, i)[axis] for i in range(len(row["curve"]))] for axis in (0, 1)]
        for down, name in enumerate(("tuned reward", "log_probability")):
            y = [figures[name] for figures in row["curve"]]
            for across in (0, 1):
                axes[down, across].plot(x[across], y, label=row["run"], **style)
                axes[down, across].plot(x[across][row["kept"]], y[row["kept"]], "o", color=style["color"])
    for across, name in enumerate(("FD-EfficientNet / the student's", "diversity / the student's")):
        axes[1, across].set_xlabel(name)
    for down, name in enumerate(("tuned reward", "held-out log-probability")):
        axes[down, 0].set_ylabel(name)
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    with atomic_path(file) as partial:
        figure.savefig(partial, format="png", dpi=110)
    pyplot.close(figure)


def page(rows: Sequence[dict[str, Any]], provenance: Mapping[str, Any], plot_file: str, pictures: str) -> str:
    """The docs page: everything in it is read off the results."""
    first, cheapest, furthest = rows[0], cheapest_run(rows), furthest_run(rows)
    settings = first["settings"]
    held_out = [
        name for name in first["curve"][0] if name not in ("fd", "diversity", "accuracy", "step", "tuned reward")
    ]
    blind = [name for name in held_out if furthest["curve"][-1][name] > furthest["curve"][0][name]]
    header = ["run", "what it is", "step kept", "tuned reward: before, kept, end"]
    header += [f"{name}: before, kept, end" for name in held_out]
    header += ["FD ratio: kept, end", "diversity ratio: kept, end", "price: FD and diversity ratio"]
    header += ["why it is stopped", "seconds"]
    lines = []
    for row in rows:
        curve, kept = row["curve"], row["kept"]
        cells = [row["run"], row["why"], str(int(curve[kept]["step"]))]
        for name in ("tuned reward", *held_out):
            cells.append(", ".join(f"{curve[i][name]:.4f}" for i in (0, kept, -1)))
        for axis in (0, 1):
            cells.append(", ".join(f"{ratios(row, i)[axis]:.3f}" for i in (kept, -1)))
        cells.append("not reached" if (cost := price(row)) is None else ", ".join(f"{ratio:.3f}" for ratio in cost))
        lines.append([*cells, row["stopped"] or "not stopped", f"{row['seconds']:.0f}"])
    text = [
        "# What each setting of reward tuning does",
        f"Seed {provenance['seed']}, torch {provenance['torch']}, threads of a run: {provenance['threads']}. Runs that "
        "the results hold already are not repeated; what they hold was made by:",
        "\n".join(f"- `{command}`" for command in dict.fromkeys(row["made"]["command"] for row in rows)),
        f"Every run tunes {first['student']} with the reward `{first['reward']}` for {settings['iterations']} steps of "
        f"{settings['batch_size']} images, K = {settings['sample_iterations']}, and is measured every "
        f"{settings['probe_every']} steps on {first['samples']} images of fixed seeds. No run was stopped; what "
        "`marval finetune` would have kept, by its held-out figures, is marked (`kept`; dots in the plot). "
        "`log_probability` is that of a classifier which no reward has seen; ratios are to the student's own figures. "
        f"The price is what they are where the held-out log-probability has risen by {GAIN:.0%} of the student's: runs "
        "of different speeds compare there.",
        markdown(header, lines),
        *([OLD_ANCHOR] if any("anchor_guidance" not in row and row["settings"]["anchor"] for row in rows) else []),
        f"![Trade-off curves]({plot_file})",
        "## What early stopping is for",
        f"The run that ends furthest from the student is `{furthest['run']}` ({furthest['why']}): {summary(furthest)}. "
        "What it was not tuned for, before, as kept and at the end: "
        + "; ".join(
            f"{name} " + ", ".join(f"{furthest['curve'][i][name]:.4f}" for i in (0, furthest["kept"], -1))
            for name in held_out
        )
        + ". "
        + (f"({', '.join(blind)} ended above the start: by that alone nothing would have been seen.) " if blind else "")
        + "Early stopping "
        + (f"ends it because {furthest['stopped']}." if furthest["stopped"] else "does not end it.")
        + " The same seeds before, as kept, and at the end:",
        f"![Before, kept, end]({pictures})",
        "## Which is cheapest",
        f"No run reaches a gain of {GAIN:.0%}."
        if cheapest is None
        else f"A held-out gain of {GAIN:.0%} costs the least Fréchet distance with **{cheapest['run']}** "
        f"({cheapest['why']}): {summary(cheapest)}.",
    ]
    return "\n\n".join(text) + "\n"


def write_page(out: Path, docs: Path, folder: Path) -> None:
    """Plot, pictures and page for the results in `out`, into `docs`."""
    study = read_results(out)["study"]
    rows = study["rows"]
    plot(rows, docs / "study-rl.png")
    pictures = place_of(folder, furthest_run(rows)["run"]) / "pictures.png"
    if pictures.is_file():
        with atomic_path(docs / "study-rl-pictures.png") as partial:
            shutil.copyfile(pictures, partial)
    write_text(docs / "study-rl.md", page(rows, study, "study-rl.png", "study-rl-pictures.png"))
