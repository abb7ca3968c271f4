"""The figures that the page shows beside the pictures: those of the results that ship with the package."""

import statistics

from marval.evaluate.report import points_of
from marval.evaluate.results import by_setting, read_results
from marval.io.files import asset


def quality(file: str) -> dict[tuple[str, int], dict[str, float]]:
    """The figures of quality in a bundled results file by model and K, each the mean over its seeds."""
    names = ("fd", "diversity", "log_probability")
    return {
        (rows[0]["model"], rows[0]["iterations"]): {name: statistics.mean(row[name] for row in rows) for name in names}
        for rows in by_setting(read_results(asset(file))["quality"])
    }


def tuning_rows() -> tuple[list[str], list[list[str]]]:
    """Before and after MARVAL-RL: the tuned reward, the held-out one, distance and diversity, by K, as bundled."""
    sweep, reward = quality("fashion-sweep.json"), quality("fashion-reward.json")
    header = ["model", "K", "reward", "held-out reward", "FD-EfficientNet", "diversity"]
    rows = []
    for k in sorted(k for model, k in reward if model == "fashion-tuned"):
        for model, told in (("fashion-student", "before"), ("fashion-tuned", "after")):
            row = sweep[model, k]
            figures = [
                f"{reward[model, k]['log_probability']:.4f}",
                f"{row['log_probability']:.4f}",
                f"{row['fd']:.1f}",
            ]
            rows.append([f"{told}: {model}", str(k), *figures, f"{row['diversity']:.2f}"])
    return header, rows


def quality_points() -> dict[str, list[tuple[float, float, int]]]:
    """(milliseconds a picture at batch 1, FD-EfficientNet, K) of each bundled model, from the bundled results."""
    points: dict[str, list[tuple[float, float, int]]] = {}
    for point in points_of(read_results(asset("fashion-sweep.json")), 1, mixed=True):
        own = points.setdefault(point.setting.model, [])
        own.append((point.seconds * 1000, point.distance, point.setting.iterations))
    return {name: points[name] for name in sorted(points, key=lambda name: name != "fashion-teacher")}
