"""README's claims from results files: their sentences, their spread, and how to repeat them (`docs/evidence.md`).

python -m marval.evaluate.evidence [ROOT]
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from marval.evaluate.pareto import points_of, verdicts
from marval.evaluate.results import Row, by_setting, markdown, read_results
from marval.io.files import write_text

DOCUMENT = "docs/evidence.md"
SWEEP, MANY, CURVE = "results/fashion-sweep.json", "results/fashion-10000.json", "results/fashion-curve.json"
TUNED = "results/fashion-rl.json"  # the student, and what tuning made of it with each seed
REFERENCE_K = 16  # of the teacher whose quality a student is to reach

HEAD = """# Evidence

Every claim of README's results with its figures, their spread and how to repeat them. Generated from `results/` by
`make tables`: do not edit. Spread is the smallest and largest over seeds of the samples, or over rounds of timing; the
weights are those of one training each.
"""

Figures = dict[str, float]


@dataclass(frozen=True)
class Measured:
    """A figure of a claim: its mean over seeds or rounds, and the smallest and largest of them."""

    label: str
    value: float
    low: float
    high: float
    count: int
    what: str = "seeds"

    @property
    def spread(self) -> str:
        """The range, or that there is none."""
        return f"{self.low:.4g} to {self.high:.4g} ({self.count} {self.what})" if self.count > 1 else "one seed"


@dataclass(frozen=True)
class Claim:
    """A sentence of README, made from a results file; `figures` reads one seed's rows by (model, K)."""

    name: str
    title: str
    file: str
    command: str  # that writes the file anew
    figures: Callable[[dict[tuple[str, int], Row]], Figures]
    sentence: Callable[[Figures, int], str]  # of means over seeds, and the number of samples

    def measured(self, root: Path) -> list[Measured]:
        """Every figure with its spread over the seeds that have all of its rows.

        Raises:
            ValueError: no seed has them.
        """
        rows = read_results(root / self.file).get("quality", {}).get("rows", [])
        found: dict[int, Figures] = {}
        for seed in sorted({row["seed"] for row in rows}):
            try:
                found[seed] = self.figures(_table(rows, seed))
            except (KeyError, ValueError):  # this seed lacks a row
                continue
        if not found:
            raise ValueError(f"{self.file} has not the rows of the claim {self.name!r}: {self.command}")
        labels = next(iter(found.values()))
        values = {label: [figures[label] for figures in found.values() if label in figures] for label in labels}
        return [Measured(label, statistics.mean(v), min(v), max(v), len(v)) for label, v in values.items()]

    def text(self, root: Path) -> str:
        """The sentence, with the figures of the results file."""
        samples = max(row["samples"] for row in read_results(root / self.file)["quality"]["rows"])
        return self.sentence({m.label: m.value for m in self.measured(root)}, samples)


def _table(rows: Sequence[Row], seed: int) -> dict[tuple[str, int], Row]:
    """One seed's rows by model and K; of a teacher at several T and w, the first that was measured."""
    table: dict[tuple[str, int], Row] = {}
    for group in by_setting(row for row in rows if row["seed"] == seed).values():
        table.setdefault((group[0]["model"], group[0]["iterations"]), group[0])
    return table


def _listed(values: Sequence[str]) -> str:
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} and {values[-1]}"


def _numbers(figures: Figures, prefix: str, form: str) -> tuple[str, str]:
    """The K and the values of figures labelled `PREFIX, K = ...`, as lists in words."""
    chosen = {label.rpartition("= ")[2]: form.format(v) for label, v in figures.items() if label.startswith(prefix)}
    return _listed(list(chosen)), _listed(list(chosen.values()))


def student_ratios(table: dict[tuple[str, int], Row]) -> Figures:
    """Fréchet distance, student / teacher, at every K that both have."""
    shared = sorted(k for model, k in table if model == "fashion-student" and ("fashion-teacher", k) in table)
    if not shared:
        raise KeyError("fashion-student")
    ratio = {k: table["fashion-student", k]["fd"] / table["fashion-teacher", k]["fd"] for k in shared}
    return {f"FD, student / teacher, K = {k}": value for k, value in ratio.items()}


def distances(table: dict[tuple[str, int], Row]) -> Figures:
    """Fréchet distance of the teacher at K = 16 and of the student at every K."""
    own = sorted((k, row["fd"]) for (model, k), row in table.items() if model == "fashion-student")
    figures = {f"FD, teacher, K = {REFERENCE_K}": table["fashion-teacher", REFERENCE_K]["fd"]}
    return figures | {f"FD, student, K = {k}": fd for k, fd in own}


def _smallest_k_sentence(figures: Figures, samples: int) -> str:
    goal, *own = figures.items()
    enough = [label.rpartition("= ")[2] for label, fd in own if fd <= goal[1]]
    return (
        f"The smallest K at which it is not above the teacher's at K = {REFERENCE_K} is {enough[0]}"
        if enough
        else f"At no K is it as low as the teacher's at K = {REFERENCE_K}"
    )


def ratios_to_reference(table: dict[tuple[str, int], Row]) -> Figures:
    """Fréchet distance of the student at every K over the teacher's at K = 16."""
    goal = table["fashion-teacher", REFERENCE_K]["fd"]
    own = sorted((k, row["fd"]) for (model, k), row in table.items() if model == "fashion-student")
    if not own:
        raise KeyError("fashion-student")
    return {f"FD over the teacher's at K = {REFERENCE_K}, student, K = {k}": fd / goal for k, fd in own}


def tuned_changes(table: dict[tuple[str, int], Row]) -> Figures:
    """Tuned against student at K = 8 and 16: differences of what is a probability, ratios of distances."""
    figures: Figures = {}
    for k in (8, 16):
        student, tuned = table["fashion-student", k], table["fashion-tuned", k]
        for name, key in (("accuracy", "accuracy"), ("log-probability", "log_probability")):
            figures[f"{name}, tuned - student, K = {k}"] = tuned[key] - student[key]
        for name, key in (("Fréchet distance", "fd"), ("diversity", "diversity")):
            figures[f"{name}, tuned / student, K = {k}"] = tuned[key] / student[key]
    return figures


def tunings(table: dict[tuple[str, int], Row]) -> Figures:
    """The student at K = 8 and what each tuning makes of it: probabilities as they are, the rest as ratios."""
    student, figures = table["fashion-student", 8], Figures()
    tuned = sorted((model, row) for (model, k), row in table.items() if model.startswith("fashion-tuned-") and k == 8)
    for name, key in (("accuracy", "accuracy"), ("log-probability", "log_probability")):
        figures[f"{name}, before"] = student[key]
        figures |= {f"{name}, {model}": row[key] for model, row in tuned}
    for name, key in (("Fréchet distance", "fd"), ("diversity", "diversity")):
        figures |= {f"{name}, {model} / student": row[key] / student[key] for model, row in tuned}
    return figures


def _tunings_sentence(figures: Figures, samples: int) -> str:
    seeds = _listed([label.rpartition("-")[2] for label in figures if label.startswith("accuracy, fashion-tuned-")])
    parts = []
    for name in ("accuracy", "log-probability", "Fréchet distance", "diversity"):
        values = [f"{value:.3f}" for label, value in figures.items() if label.startswith(name)]
        before = f"{values.pop(0)}, then " if f"{name}, before" in figures else ""
        parts.append(f"{name} {before}{_listed(values)}{'' if before else ' times'}")
    return f"{samples:,} samples at K = 8, before and after tuning with seeds {seeds}: {'; '.join(parts)}"


def _student_sentence(figures: Figures, samples: int) -> str:
    ks, values = _numbers(figures, "FD", "{:.2f}")
    return f"with {samples:,} samples its Fréchet distance is {values} times the teacher's at K = {ks}"


def _many_sentence(figures: Figures, samples: int) -> str:
    (_, first), *others = figures.items()
    rest = "".join(f"; at K = {label.rpartition('= ')[2]}, {value:.2f} times" for label, value in others)
    return f"with {samples:,} samples too: {first:.2f} times{rest}"


def _tuned_sentence(figures: Figures, samples: int) -> str:
    forms = {"accuracy": "{:+.3f}", "log-probability": "{:+.3f}", "Fréchet distance": "{:.3f}", "diversity": "{:.3f}"}
    ks, _ = _numbers(figures, "accuracy", "{}")
    parts = [f"{name} {_numbers(figures, name, form)[1]}" for name, form in forms.items()]
    parts[2:] = [f"{part} times" for part in parts[2:]]
    return f"{samples:,} samples at K = {ks}: {', '.join(parts)}"


EVALUATE = (
    "marval evaluate fashion-teacher fashion-student{tuned} --iterations {k} --samples {n} "
    "--seed 0 1 2 --autocast --out {out}"
)
ALL = EVALUATE.format(tuned=" fashion-tuned", k="4 6 8 16 32", n=2000, out=SWEEP)
TEN_THOUSAND = EVALUATE.format(tuned="", k="6 16", n=10_000, out=MANY) + " --batches"
BENCH = (
    "marval evaluate fashion-teacher fashion-student --iterations 4 8 16 32 --steps 100 50 25 10 --samples 2000 "
    f"--seed 0 1 2 --autocast --batches --out {CURVE}`, then `marval bench fashion-teacher fashion-student "
    f"--iterations 4 8 16 32 --steps 100 50 25 10 --batches 1 64 --plot docs/curve.png --out {CURVE}"
)

TUNE = (
    "for s in 0 1 2; do marval finetune fashion-student --name fashion-tuned-$s --reward classifier --seed $s "
    "--out tuned-$s; done`, then `marval evaluate fashion-student tuned-0 tuned-1 tuned-2 --iterations 8 "
    f"--samples 10000 --autocast --batches --out {TUNED}"
)

CLAIMS = (
    Claim("student", "Student against teacher, at the same K", SWEEP, ALL, student_ratios, _student_sentence),
    Claim(
        "smallest-k", f"The student's K for the teacher's quality at K = {REFERENCE_K}", SWEEP, ALL, distances,
        _smallest_k_sentence,
    ),
    Claim("many-samples", "The same with more samples", MANY, TEN_THOUSAND, ratios_to_reference, _many_sentence),
    Claim("tuned", "Tuned against student", SWEEP, ALL, tuned_changes, _tuned_sentence),
    Claim("tunings", "Three tunings", TUNED, TUNE, tunings, _tunings_sentence),
)  # fmt: skip


def speed_ups(root: Path) -> list[Measured]:
    """How many times faster the student draws than the teacher at the same K, over the rounds of timing."""
    rows = read_results(root / SWEEP).get("timing", {}).get("rows", [])
    teacher = {(r["iterations"], r["batch"]): r for r in rows if r["model"] == "fashion-teacher"}
    return [
        Measured(
            f"speed-up, K = {r['iterations']}, batch {r['batch']}", t["seconds_per_image"] / r["seconds_per_image"],
            t["fastest"] / r["slowest"], t["slowest"] / r["fastest"], r["repeats"], "rounds",
        )
        for r in rows if r["model"] == "fashion-student" and (t := teacher.get((r["iterations"], r["batch"])))
    ]  # fmt: skip


def provenance_lines(root: Path, file: str, part: str) -> list[str]:
    """What made a part of a results file: commands, commits, seeds, threads; and the models' hashes."""
    content = read_results(root / file)[part]
    rows = content["rows"]
    commands = {row.get("made", content)["command"] for row in rows}
    commits = {row.get("made", content)["commit"] for row in rows}
    devices = {row["made"]["device"] for row in rows if "made" in row} or {content.get("machine", "not recorded")}
    seeds = sorted({row.get("seed", content.get("seed", 0)) for row in rows})
    hashes = sorted({(row["model"], row["sha256"][:12]) for row in rows if "sha256" in row})
    return [
        f"- From `{file}`: seed {_listed([str(seed) for seed in seeds])}, torch {content.get('torch', '?')}, "
        f"{content.get('threads', '?')} threads, {_listed(sorted(devices))}"
        + (f"; models {_listed([f'{name} ({digest})' for name, digest in hashes])}." if hashes else "."),
        *(f"- Measured by `{command}`" for command in sorted(commands)),
        f"- At commit {_listed([commit[:12] for commit in sorted(commits)])}.",
    ]


def _section(title: str, sentence: str, measured: Sequence[Measured], lines: Sequence[str], command: str) -> str:
    parts = [f"## {title}", ""]
    if sentence:
        parts += [f"> {sentence}.", ""]
    if measured:
        rows = [(m.label, f"{m.value:.4g}", m.spread) for m in measured]
        parts += [markdown(("figure", "value", "spread"), rows), ""]
    again = "Again" if measured else "Measure it"
    return "\n".join([*parts, *lines, f"- {again}: `{command}`", ""])


def evidence(root: Path) -> str:
    """The whole document. What was not measured says so, and by which command it would be."""
    sections = []
    for claim in CLAIMS:
        if (root / claim.file).is_file():
            lines = provenance_lines(root, claim.file, "quality")
            sections.append(_section(claim.title, claim.text(root), claim.measured(root), lines, claim.command))
        else:
            sections.append(_section(claim.title, "", (), ["- Not measured yet."], claim.command))
    if (root / SWEEP).is_file() and speed_ups(root):
        lines = provenance_lines(root, SWEEP, "timing")
        sections.append(_section("Speed of the student at the same K", "", speed_ups(root), lines, ALL))
    title = "The student against a teacher with fewer diffusion steps"
    if (root / CURVE).is_file():
        said = [f"- {line}." for batch in (1, 64) for line in _verdicts(root, batch)]
        sections.append(_section(title, "", (), [*said, *provenance_lines(root, CURVE, "bench")], BENCH))
    else:
        sections.append(_section(title, "", (), ["- Not measured yet."], BENCH))
    return "\n".join([HEAD, *sections])


def _verdicts(root: Path, batch: int) -> list[str]:
    return [f"{line} (batch {batch})" for line in verdicts(points_of(root / CURVE, batch=batch))]


def write_evidence(root: Path) -> bool:
    """Write the document; True if it changed."""
    file, text = root / DOCUMENT, evidence(root)
    if file.is_file() and file.read_text() == text:
        return False
    write_text(file, text)
    return True


if __name__ == "__main__":
    import sys

    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path.cwd()
    print(f"{DOCUMENT}: {'written' if write_evidence(folder) else 'unchanged'}")
