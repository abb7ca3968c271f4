"""The figures that the page shows beside the pictures: those of the results that ship with the package."""

from importlib.resources import files
from pathlib import Path

from marval.evaluate.results import read_results


def bundled(name: str) -> Path:
    """A results file that ships with the package."""
    return Path(str(files("marval"))) / "assets" / name


def tuning_rows() -> tuple[list[str], list[list[str]]]:
    """Before and after MARVAL-RL: the tuned reward, the held-out one, distance and diversity, by K, as bundled."""
    sweep = {
        (row["model"], row["iterations"]): row for row in read_results(bundled("fashion-sweep.json"))["quality"]["rows"]
    }
    reward = {
        (row["model"], row["iterations"]): row["log_probability"]
        for row in read_results(bundled("fashion-reward.json"))["quality"]["rows"]
    }
    header = ["model", "K", "reward", "held-out reward", "FD-EfficientNet", "diversity"]
    rows = []
    for k in sorted(k for model, k in reward if model == "fashion-tuned"):
        for model, told in (("fashion-student", "before"), ("fashion-tuned", "after")):
            row = sweep[model, k]
            figures = [f"{reward[model, k]:.4f}", f"{row['log_probability']:.4f}", f"{row['fd']:.1f}"]
            rows.append([f"{told}: {model}", str(k), *figures, f"{row['diversity']:.2f}"])
    return header, rows


def quality_points() -> dict[str, list[tuple[float, float, int]]]:
    """(milliseconds a picture at batch 1, FD-EfficientNet, K) of each bundled model, from the bundled results."""
    results = read_results(bundled("fashion-sweep.json"))
    seconds = {
        (row["model"], row["iterations"]): row["seconds_per_image"]
        for row in results["timing"]["rows"]
        if row["batch"] == 1
    }
    points: dict[str, list[tuple[float, float, int]]] = {}
    for row in sorted(results["quality"]["rows"], key=lambda row: row["iterations"]):
        at = row["model"], row["iterations"]
        if at in seconds:
            points.setdefault(row["model"], []).append((seconds[at] * 1000, row["fd"], row["iterations"]))
    return {name: points[name] for name in sorted(points, key=lambda name: name != "fashion-teacher")}
