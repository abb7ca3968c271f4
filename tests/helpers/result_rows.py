"""Rows of results files, as tests write them."""

from marval.evaluate.results import write_results


def quality(model="s", k=8, seed=0, fd=10.0, **changes):
    draw = {"kind": "one_step", "timestep": 755}
    row = {"model": model, "teacher": False, "draw": draw, "order": "spread", "sha256": "a" * 64, "iterations": k}
    row |= {"samples": 100, "seed": seed, "dtype": "float32", "fd": fd, "accuracy": 0.9, "features": "E"}
    return row | {"data_sha256": "d" * 64, "made": {"command": "marval evaluate s", "commit": "c" * 40}} | changes


def teacher(k, t, fd, **changes):
    return quality(
        "t", k, fd=fd, teacher=True, draw={"kind": "chain", "diffusion_steps": t, "guidance": 3.0}, **changes
    )


def timed(row, seconds, batch=1):
    kept = {name: row[name] for name in ("model", "teacher", "draw", "order", "iterations")}
    rounds = {"seconds_per_image": seconds, "fastest": 0.9 * seconds, "slowest": 1.2 * seconds}
    return {**kept, "batch": batch, "dtype": row["dtype"], "made": {}, **rounds}


def write(file, rows, times=()):
    write_results(file, "quality", rows)
    if times:
        write_results(file, "timing", list(times))
    return file


def write_curve(folder):
    """Two teachers (T = 100, 10) at two K, a student that beats all of them but one, and a seed more of it."""
    teachers = [teacher(8, 100, 10.0), teacher(16, 100, 8.0), teacher(8, 10, 30.0), teacher(16, 10, 25.0)]
    students = [quality(k=4, fd=12.0), quality(k=8, fd=9.0), quality(k=8, seed=1, fd=9.5)]
    times = zip([*teachers, *students[:2]], [1.0, 2.0, 0.1, 0.2, 0.02, 0.05], strict=True)
    return write(folder / "curve.json", [*teachers, *students], [timed(row, t) for row, t in times])
