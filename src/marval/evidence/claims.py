"""What README claims: sentences made of figures, the results files that they come from, how to repeat them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from marval.evaluate.results import read_results
from marval.evidence.figures import (
    REFERENCE_K,
    Figures,
    Measured,
    curve,
    full_size,
    memory,
    over_seeds,
    ratios_to_reference,
    rewards,
    same_quality,
    speed_ups,
    straightforward,
    student_ratios,
    study,
    tuned_changes,
    tunings,
)
from marval.study import GAIN

SWEEP, MANY, CURVE = "results/fashion-sweep.json", "results/fashion-10000.json", "results/fashion-curve.json"
TUNED = "results/fashion-rl.json"  # the student, and what tuning made of it with each seed
REWARDS, STUDY = "results/fashion-rewards.json", "results/study-rl.json"
FULL_SIZE, BASE = "results/imagenet256-base.json", "results/mar-base.json"


@dataclass(frozen=True)
class Claim:
    """Something that README says, made from a results file."""

    name: str
    title: str
    file: str
    parts: tuple[str, ...]  # of the results file, from which it comes
    commands: tuple[str, ...]  # that write the file anew
    measure: Callable[[Path], list[Measured]]  # of the file
    sentence: Callable[[Figures, int], str] | None  # of the values, and the number of samples; None: README has a table

    def measured(self, root: Path) -> list[Measured]:
        """Every figure with its spread.

        Raises:
            ValueError: the results file lacks what the claim stands on.
        """
        try:
            found = self.measure(root / self.file)
        except (KeyError, IndexError, StopIteration):
            found = []
        if not found:
            raise ValueError(f"{self.file} has not what the claim {self.name!r} stands on: {'; '.join(self.commands)}")
        return found

    def text(self, root: Path) -> str:
        """The sentence, with the figures of the results file; empty for a claim without one."""
        if self.sentence is None:
            return ""
        values = {m.label: m.value for m in self.measured(root)}
        results = read_results(root / self.file)
        samples = max((row.get("samples", 0) for part in self.parts for row in results[part]["rows"]), default=0)
        return self.sentence(values, samples)


def listed(values: Sequence[str]) -> str:
    """Values in words: "a, b and c"."""
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} and {values[-1]}"


def _numbers(figures: Figures, prefix: str, form: str) -> tuple[str, str]:
    """The K and the values of figures labelled `PREFIX, K = ...`, as lists in words."""
    chosen = {label.rpartition("= ")[2]: form.format(v) for label, v in figures.items() if label.startswith(prefix)}
    return listed(list(chosen)), listed(list(chosen.values()))


def _student_sentence(figures: Figures, samples: int) -> str:
    ks, values = _numbers(figures, "FD", "{:.2f}")
    return f"with {samples:,} samples its Fréchet distance is {values} times the teacher's at K = {ks}"


def _smallest_k_sentence(figures: Figures, samples: int) -> str:
    enough = [(label.rpartition("= ")[2], ratio) for label, ratio in figures.items() if ratio <= 1]
    if not enough:
        return f"At no K is it as low as the teacher's at K = {REFERENCE_K}"
    k, ratio = enough[0]
    return f"The smallest K at which it is not above the teacher's at K = {REFERENCE_K} is {k} ({ratio:.2f} times)"


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


def _tunings_sentence(figures: Figures, samples: int) -> str:
    seeds = listed([label.rpartition("-")[2] for label in figures if label.startswith("accuracy, fashion-tuned-")])
    parts = []
    for name in ("accuracy", "log-probability", "Fréchet distance", "diversity"):
        values = [f"{value:.3f}" for label, value in figures.items() if label.startswith(name)]
        before = f"{values.pop(0)}, then " if f"{name}, before" in figures else ""
        parts.append(f"{name} {before}{listed(values)}{'' if before else ' times'}")
    return f"{samples:,} samples at K = 8, before and after tuning with seeds {seeds}: {'; '.join(parts)}"


def _same_quality_sentence(figures: Figures, samples: int) -> str:
    models: dict[str, list[str]] = {}
    for label, value in figures.items():
        _, model, batch = label.split(", ")
        models.setdefault(model.partition(" over")[0], []).append(f"{value:.0f}x as fast at {batch}")
    said = [f"{model} is {listed(speeds)}" for model, speeds in models.items()]
    return f"where its distance is first not above the teacher's at K = {REFERENCE_K}, {'; '.join(said)}"


def _full_size_sentence(figures: Figures, samples: int) -> str:
    ks, shares = _numbers(figures, "context", "{:.0%}")
    _, savings = _numbers(figures, "operations", "{:.1f}")
    return (
        f"the context network, which both need, is {shares} of a teacher's operations at K = {ks}, so at the same K a "
        f"student needs {savings} times fewer operations"
    )


def _straightforward_sentence(figures: Figures, samples: int) -> str:
    parts = []
    for k in dict.fromkeys(label.rpartition("= ")[2] for label in figures):
        values = [f"{v:.0f}" if v >= 20 else f"{v:.1f}" for label, v in figures.items() if label.endswith(f"= {k}")]
        parts.append(f"{listed(values)} seconds at K = {k}")
    return f"our teacher and our student took {listed(parts)}"


def _memory_sentence(figures: Figures, samples: int) -> str:
    def of(start: str) -> list[str]:
        planned = [f" (planned {v:.1f})" for label, v in figures.items() if label.startswith(f"GiB planned, {start}")]
        measured = [f"{v:.1f} GiB" for label, v in figures.items() if label.startswith(f"GiB, {start}")]
        return [f"{m}{p}" for m, p in zip(measured, planned or [""] * len(measured), strict=True)]

    one, four = of("GSIM step")
    return (
        f"a GSIM step takes {one} at batch 1 and {four} at batch 4; a tuning step (K = 4, M = 1) with KL-16, which the "
        f"plan leaves out, {of('tuning')[0]}; a GSIM step that also saves its state and model {of('step and')[0]}"
    )


def _curve_sentence(figures: Figures, samples: int) -> str:
    parts = []
    for label, count in figures.items():
        if label.startswith("points"):
            batch = label.rpartition(", ")[2]
            beaten, gain = figures[f"beaten by the student, {batch}"], figures[f"smallest gain, {batch}"]
            parts.append(
                f"{beaten:.0f} of the teacher's {count:.0f} points at {batch} (by at least {gain:.1f}x in time)"
            )
    return f"with {samples:,} samples the student beats, in time and distance at once, {listed(parts)}"


def _study_sentence(figures: Figures, samples: int) -> str:
    def of(name: str) -> list[tuple[float, str]]:
        return [(v, label.partition(", ")[2]) for label, v in figures.items() if label.startswith(name)]

    distance, cheapest = min(of("Fréchet distance at the gain"))
    diversity, kindest = max(of("diversity at the gain"))
    (end, furthest), (left, _) = *of("Fréchet distance at the end"), *of("diversity at the end")
    return (
        f"{GAIN:.0%} of held-out log-probability cost the least Fréchet distance with `{cheapest}` ({distance:.3f} "
        f"times the student's) and the least diversity with `{kindest}` ({diversity:.3f} times); `{furthest}` ends at "
        f"{end:.1f} times the distance and {left:.2f} times the diversity"
    )


ALL = (
    "marval evaluate fashion-teacher fashion-student fashion-tuned --iterations 4 6 8 16 32 --samples 2000 --seed "
    f"0 1 2 --autocast --out {SWEEP}",
)
TEN_THOUSAND = tuple(
    f"marval evaluate {models} --samples 10000 --seed 0 1 --autocast --batches --out {MANY}"
    for models in ("fashion-teacher --iterations 16", "fashion-student fashion-tuned --iterations 6 16")
)
TUNE = (
    "for s in 0 1 2; do marval finetune fashion-student --name fashion-tuned-$s --reward classifier --seed $s "
    "--out tuned-$s; done",
    "marval evaluate fashion-student tuned-0 tuned-1 tuned-2 --iterations 8 --samples 10000 --autocast --batches "
    f"--out {TUNED}",
)
DRAW_CURVE = (
    "marval evaluate fashion-teacher fashion-student --iterations 4 8 16 32 --steps 100 50 25 10 --samples 2000 "
    f"--seed 0 1 2 --autocast --batches --out {CURVE}",
    "marval bench fashion-teacher fashion-student --iterations 4 8 16 32 --steps 100 50 25 10 --batches 1 64 "
    f"--plot docs/curve.png --out {CURVE}",
)

CLAIMS = (
    Claim(
        "student", "Student against teacher, at the same K", SWEEP, ("quality",), ALL, over_seeds(student_ratios),
        _student_sentence,
    ),
    Claim(
        "smallest-k", f"The student's K for the teacher's quality at K = {REFERENCE_K}", SWEEP, ("quality",), ALL,
        over_seeds(ratios_to_reference), _smallest_k_sentence,
    ),
    Claim(
        "many-samples", "The same with more samples", MANY, ("quality",), TEN_THOUSAND, over_seeds(ratios_to_reference),
        _many_sentence,
    ),
    Claim("speed", "Speed of the student at the same K", SWEEP, ("timing",), ALL, speed_ups, None),
    Claim(
        "same-quality", "Speed at the teacher's quality", SWEEP, ("timing", "quality"), ALL, same_quality,
        _same_quality_sentence,
    ),
    Claim(
        "curve", "The student against a teacher with fewer diffusion steps", CURVE, ("quality", "bench"), DRAW_CURVE,
        curve, _curve_sentence,
    ),
    Claim("tuned", "Tuned against student", SWEEP, ("quality",), ALL, over_seeds(tuned_changes), _tuned_sentence),
    Claim("tunings", "Three tunings", TUNED, ("quality",), TUNE, over_seeds(tunings), _tunings_sentence),
    Claim("rewards", "Rewards over class-name prompts", REWARDS, ("rewards",), (
        "marval evaluate fashion-teacher fashion-student fashion-tuned --rewards text-image,classifier --iterations 8 "
        f"--samples 1000 --autocast --out {REWARDS}",
    ), rewards, None),
    Claim(
        "study", "What each setting of tuning costs", STUDY, ("study",),
        (f"marval study rl --iterations 200 --probe-every 20 --samples 1000 --out {STUDY} --docs docs/",), study,
        _study_sentence,
    ),
    Claim("full-size", "How much faster a full-size student can be", FULL_SIZE, ("bench",), (
        f"marval bench imagenet256-base --iterations 16 64 --batches 1 4 8 --repeats 0 --out {FULL_SIZE}",
    ), full_size, _full_size_sentence),
    Claim(
        "straightforward", "The official loop, our teacher and our student at full size", BASE, ("full-size",),
        tuple(f"python tests/full_size.py speed {k} {BASE}" for k in (16, 64)), straightforward,
        _straightforward_sentence,
    ),
    Claim("memory", "Memory of a full-size training step", BASE, ("full-size",), tuple(
        f"python tests/full_size.py {stage} {BASE}" for stage in ("distill 1", "distill 4", "finetune 1", "save 1")
    ), memory, _memory_sentence),
)  # fmt: skip
