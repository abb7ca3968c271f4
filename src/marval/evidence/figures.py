"""Figures with their spread, read off results files: what the claims of README stand on."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from marval.evaluate.pareto import points_of, smallest_gain, unbeaten
from marval.evaluate.results import Row, by_setting, mean_distances, named, read_results, times_by_batch
from marval.study import furthest_run, price, ratios

REFERENCE_K = 16  # of the teacher whose quality a student is to reach
TEACHER, STUDENT = "fashion-teacher", "fashion-student"

Figures = Mapping[str, float]  # by label
Table = Mapping[tuple[str, int], Row]  # one seed's rows by (model, K)


@dataclass(frozen=True)
class Measured:
    """A figure of a claim: its mean over seeds (or median over rounds), and the smallest and largest of them."""

    label: str
    value: float
    low: float
    high: float
    of: str  # what low and high are over: "3 seeds", "one run", ...

    @property
    def spread(self) -> str:
        """The range and what it is over."""
        return self.of if self.low == self.high else f"{self.low:.4g} to {self.high:.4g} ({self.of})"


def single(label: str, value: float, of: str = "one run") -> Measured:
    """A figure without a spread."""
    return Measured(label, value, value, value, of)


def ranged(label: str, values: Sequence[float]) -> Measured:
    """The mean over seeds, with their range."""
    of = f"{len(values)} seeds" if len(values) > 1 else "one seed"
    return Measured(label, statistics.mean(values), min(values), max(values), of)


# Quality, by the seeds of the samples


def over_seeds(figures: Callable[[Table], Figures]) -> Callable[[Path], list[Measured]]:
    """Figures of one seed's rows, measured over all seeds that have the rows."""

    def measure(file: Path) -> list[Measured]:
        rows = read_results(file).get("quality", {}).get("rows", [])
        found: dict[str, list[float]] = {}
        for seed in sorted({row["seed"] for row in rows}):
            try:
                one = figures(_table(rows, seed))
            except KeyError:  # this seed lacks a row
                continue
            for label, value in one.items():
                found.setdefault(label, []).append(value)
        return [ranged(label, values) for label, values in found.items()]

    return measure


def _table(rows: Sequence[Row], seed: int) -> dict[tuple[str, int], Row]:
    """One seed's rows by model and K; of a teacher at several T and w, the first that was measured."""
    table: dict[tuple[str, int], Row] = {}
    for group in by_setting(row for row in rows if row["seed"] == seed).values():
        table.setdefault((group[0]["model"], group[0]["iterations"]), group[0])
    return table


def _of_student(table: Table) -> list[tuple[int, Row]]:
    own = sorted(((k, row) for (model, k), row in table.items() if model == STUDENT), key=lambda pair: pair[0])
    if not own:
        raise KeyError(STUDENT)
    return own


def student_ratios(table: Table) -> Figures:
    """Fréchet distance, student / teacher, at every K that both have."""
    shared = [(k, row["fd"] / table[TEACHER, k]["fd"]) for k, row in _of_student(table) if (TEACHER, k) in table]
    return {f"FD, student / teacher, K = {k}": ratio for k, ratio in shared}


def ratios_to_reference(table: Table) -> Figures:
    """Fréchet distance of the student at every K over the teacher's at K = 16."""
    goal = table[TEACHER, REFERENCE_K]["fd"]
    own = _of_student(table)
    return {f"FD over the teacher's at K = {REFERENCE_K}, student, K = {k}": row["fd"] / goal for k, row in own}


def tuned_changes(table: Table) -> Figures:
    """Tuned against student at K = 8 and 16: differences of what is a probability, ratios of distances."""
    figures: dict[str, float] = {}
    for k in (8, 16):
        student, tuned = table[STUDENT, k], table["fashion-tuned", k]
        for name, key in (("accuracy", "accuracy"), ("log-probability", "log_probability")):
            figures[f"{name}, tuned - student, K = {k}"] = tuned[key] - student[key]
        for name, key in (("Fréchet distance", "fd"), ("diversity", "diversity")):
            figures[f"{name}, tuned / student, K = {k}"] = tuned[key] / student[key]
    return figures


def tunings(table: Table) -> Figures:
    """The student at K = 8 and what each tuning makes of it: probabilities as they are, the rest as ratios."""
    student, figures = table[STUDENT, 8], dict[str, float]()
    tuned = sorted((model, row) for (model, k), row in table.items() if model.startswith("fashion-tuned-") and k == 8)
    for name, key in (("accuracy", "accuracy"), ("log-probability", "log_probability")):
        figures[f"{name}, before"] = student[key]
        figures |= {f"{name}, {model}": row[key] for model, row in tuned}
    for name, key in (("Fréchet distance", "fd"), ("diversity", "diversity")):
        figures |= {f"{name}, {model} / student": row[key] / student[key] for model, row in tuned}
    return figures


# Speed, by the rounds of timing


def _speed_up(label: str, slow: Row, fast: Row) -> Measured:
    """Of medians; the spread is from the slow one's fastest round to its slowest, over the fast one's opposite."""
    value = slow["seconds_per_image"] / fast["seconds_per_image"]
    low, high = slow["fastest"] / fast["slowest"], slow["slowest"] / fast["fastest"]
    repeats = min(slow["repeats"], fast["repeats"])
    return Measured(label, value, low, high, f"{repeats} rounds" if repeats > 1 else "one round")


def speed_ups(file: Path) -> list[Measured]:
    """How many times faster the student draws than the teacher at the same K, at each batch size."""
    timing = times_by_batch(read_results(file))
    return [
        _speed_up(f"speed-up, K = {k}, batch {batch}", teacher, row)
        for (model, k, batch), row in timing.items()
        if model == STUDENT and (teacher := timing.get((TEACHER, k, batch)))
    ]


def same_quality(file: Path) -> list[Measured]:
    """The speed-up of each student at its smallest K whose distance is not above the teacher's at K = 16.

    Distances are means over seeds. A student that reaches it at no K is left out.
    """
    results = read_results(file)
    fd = {(model, k): value for (model, k, *_), value in mean_distances(results["quality"]["rows"]).items()}
    timing = times_by_batch(results)
    found = []
    for model in dict.fromkeys(model for model, _ in fd if model != TEACHER):
        enough = [k for (name, k), value in fd.items() if name == model and value <= fd[TEACHER, REFERENCE_K]]
        for batch in sorted({batch for _, _, batch in timing}) if enough else ():
            label = f"speed-up, {model} at K = {min(enough)} over the teacher at K = {REFERENCE_K}, batch {batch}"
            slow, fast = timing.get((TEACHER, REFERENCE_K, batch)), timing.get((model, min(enough), batch))
            if slow and fast:
                found.append(_speed_up(label, slow, fast))
    return found


def full_size(file: Path) -> list[Measured]:
    """MAR-B: the context network's share of the teacher's operations, and what the student saves, counted and timed."""
    rows = read_results(file)["bench"]["rows"]
    found, shares, savings = [], [], []
    for teacher in (row for row in rows if row["teacher"]):
        k, batch = teacher["iterations"], teacher["batch"]
        student = next(r for r in rows if not r["teacher"] and (r["iterations"], r["batch"]) == (k, batch))
        if batch == rows[0]["batch"]:  # counted operations are the same in every batch
            share = teacher["context_gflops"] / teacher["gflops_per_image"]
            saving = teacher["gflops_per_image"] / student["gflops_per_image"]
            shares.append(single(f"context network's share of the teacher's operations, K = {k}", share, "counted"))
            savings.append(single(f"operations, teacher / student, K = {k}", saving, "counted"))
        found.append(_speed_up(f"speed-up, batch {batch}, K = {k}", teacher, student))
    return [*shares, *savings, *found]


def _rows_of_base(file: Path, stage: str) -> list[Row]:
    return [row for row in read_results(file)["full-size"]["rows"] if row["stage"] == stage]


def straightforward(file: Path) -> list[Measured]:
    """Seconds of one full-size image by the official loop in plain PyTorch, by our teacher and by our student."""
    return [
        single(f"seconds, {name}, K = {row['count']}", row[name])
        for row in _rows_of_base(file, "speed")
        for name in ("straightforward", "teacher", "student")
    ]


def memory(file: Path) -> list[Measured]:
    """Peak memory of a full-size training step of one process and what was planned, in GiB."""
    names = {"distill": "GSIM step", "finetune": "tuning step (K = 4, M = 1, with KL-16)", "save": "step and save"}
    return [
        single(f"GiB{of}, {name}, batch {row['count']}", row[key] / 2**30, how)
        for stage, name in names.items()
        for row in _rows_of_base(file, stage)
        for of, key, how in (("", "bytes", "one run"), (" planned", "planned_bytes", "counted"))
        if key in row
    ]


# Quality against time


def curve(file: Path) -> list[Measured]:
    """The teacher's points (K, T), those that the student beats in time and distance, and how clearly.

    Distances are means over seeds; the spread is of each seed's own.
    """
    results, found = read_results(file), []
    seeds = sorted({row["seed"] for row in results["quality"]["rows"]})
    for batch in sorted({row["batch"] for row in results["bench"]["rows"]}):
        figures: list[tuple[float, float, float]] = []  # the first: of the means over seeds
        for seed in (None, *seeds):
            points = points_of(file, part="bench", batch=batch, seed=seed, mixed=True)
            teacher, student = [p for p in points if p.teacher], [p for p in points if p.model == STUDENT]
            if teacher and student and (not figures or len(teacher) == figures[0][0]):  # a seed that has all of them
                beaten = float(len(teacher) - len(unbeaten(teacher, student)))
                figures.append((float(len(teacher)), beaten, smallest_gain(teacher, student)))
        (count, *_), *_ = figures
        found.append(single(f"points of the teacher, batch {batch}", count, "counted"))
        for i, name in ((1, "beaten by the student"), (2, "smallest gain")):
            value, *each = [one[i] for one in figures]
            found.append(Measured(f"{name}, batch {batch}", value, min(each), max(each), f"{len(each)} seeds"))
    groups = by_setting(results["quality"]["rows"]).values()
    return found + [ranged(f"FD, {named(rows[0])}", [row["fd"] for row in rows]) for rows in groups]


# Tuning


def rewards(file: Path) -> list[Measured]:
    """Mean rewards over class-name prompts with their standard error over images."""
    return [
        Measured(
            f"{name}, {row['model']}, K = {row['iterations']}", one["mean"], one["mean"] - one["standard_error"],
            one["mean"] + one["standard_error"], f"± one standard error over {row['samples']:,} images",
        )
        for row in read_results(file)["rewards"]["rows"]
        for name, one in row["rewards"].items()
    ]  # fmt: skip


def study(file: Path) -> list[Measured]:
    """Distance and diversity, over the student's, where each run has the held-out gain; and where the furthest ends."""
    rows = read_results(file)["study"]["rows"]
    prices = {row["run"]: cost for row in rows if (cost := price(row)) is not None}
    found = []
    for i, name in enumerate(("Fréchet distance", "diversity")):
        found += [single(f"{name} at the gain, {run}", cost[i]) for run, cost in prices.items()]
    furthest = furthest_run(rows)
    ends = zip(("Fréchet distance", "diversity"), ratios(furthest, -1), strict=True)
    return found + [single(f"{name} at the end, {furthest['run']}", value) for name, value in ends]
