"""What people read agrees with the results, the commands and the files that are there."""

import json
import re
import statistics
from pathlib import Path

import pytest

from marval.cli import VERBS
from marval.rewards import KNOWN
from tables import fill

ROOT = Path(__file__).parents[2]
FOLDERS = ".", "docs", "model_cards", "models", "examples/emoji"
DOCUMENTS = sorted(document for folder in FOLDERS for document in (ROOT / folder).glob("*.md"))


def name_of(document):
    return str(document.relative_to(ROOT))


@pytest.mark.parametrize("name", ["results.md", "full-size.md"])
def test_tables_are_those_of_the_results(name):
    text = (ROOT / "docs" / name).read_text()
    assert text.count("<!-- table: ") == text.count("<!-- end -->") > 0
    assert fill(text, ROOT) == text, "run `make tables`"


def test_readmes_four_rows_are_those_of_the_results():
    rows = json.loads((ROOT / "results/fashion-10000.json").read_text())["quality"]["rows"]
    expected = []
    for model, k in (("teacher", 16), ("student", 6), ("student", 16), ("tuned", 6)):
        seeds = [row for row in rows if (row["model"], row["iterations"]) == (f"fashion-{model}", k)]
        assert {row["samples"] for row in seeds} == {10_000}
        fd, accuracy, gflops = (
            statistics.mean(row[name] for row in seeds) for name in ("fd", "accuracy", "gflops_per_image")
        )
        expected.append(f"| fashion-{model} | {k} | {fd:.0f} | {accuracy:.3f} | {gflops:.1f} |")
    assert re.findall(r"^\| fashion-.*", (ROOT / "README.md").read_text(), re.MULTILINE) == expected


def test_readme_is_short_and_its_numbers_are_those_of_the_results():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 93
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|^## .*?$|Python 3\.11", "", text, flags=re.DOTALL | re.MULTILINE)
    numbers = re.findall(r"(?<![\w.-])\d[\d.,]*(?<=\d)", prose)
    assert len(numbers) <= 30
    values = {f"{value:,.{digits}f}" for value in result_means() for digits in range(4)}
    assert [number for number in numbers if number not in values] == []


def result_means():
    """Every number in the rows of the results, and each figure's means over the seeds of a setting."""
    for file in ROOT.glob("results/*.json"):
        for part in json.loads(file.read_text()).values():
            groups = {}
            rows = part.get("rows", ()) if isinstance(part, dict) else part if isinstance(part, list) else ()
            for row in (row for row in rows if isinstance(row, dict)):
                names = "model", "role", "mode", "iterations", "draw", "samples", "batch"
                setting = json.dumps([row.get(name) for name in names])
                for name, value in row.items():
                    if isinstance(value, int | float):
                        groups.setdefault((setting, name), []).append(value)
            yield from (value for values in groups.values() for value in (*values, statistics.mean(values)))


def test_the_student_beats_every_point_of_the_teachers_curve_by_as_much_as_is_said():
    """At each point of the teacher, the fastest student with a lower mean distance; the smallest gain of all points."""
    results = json.loads((ROOT / "results/fashion-curve.json").read_text())
    distances = {}
    for row in results["quality"]["rows"]:
        distances.setdefault((row["model"], row["draw"].get("diffusion_steps"), row["iterations"]), []).append(
            row["fd"]
        )
    for batch, gain in ((1, "4.8"), (64, "7.0")):
        points = [
            (row["teacher"], row["seconds_per_image"], statistics.mean(distances[key]))
            for row in results["bench"]["rows"]
            if row["batch"] == batch
            and (key := (row["model"], row["draw"].get("diffusion_steps"), row["iterations"])) in distances
        ]
        teachers, students = ([(s, fd) for teacher, s, fd in points if teacher == is_] for is_ in (True, False))
        assert len(teachers) == 16
        gains = [max(seconds / s for s, lower in students if lower < fd) for seconds, fd in teachers]
        assert f"{min(gains):.1f}" == gain
    said = " ".join((ROOT / "docs/results.md").read_text().split())
    assert "all 16 points of the teacher in time and distance at once: by at least 4.8 times" in said


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere_and_commands_are_there(document):
    text = document.read_text()
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert link.startswith("http") or (document.parent / link).exists(), link
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for verb in re.findall(r"^(?:.* -m )?marval (\S+)", block, re.MULTILINE):
            assert verb in VERBS, verb
    for tool in re.findall(r"\btools/\w+\.py", text):
        assert (ROOT / tool).is_file(), tool


def test_every_reward_is_documented_with_the_licence_of_its_weights():
    text = (ROOT / "docs/tuning.md").read_text()
    help_text = VERBS["tune"].__doc__
    for name, (_, source) in KNOWN.items():
        assert re.search(rf"\| `{name}` \| [^|]+ \| {re.escape(source)} \| [^|]+ \|", text)
        assert name in help_text
