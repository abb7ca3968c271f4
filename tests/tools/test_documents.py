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
FOLDERS = ".", "docs", "model_cards", "examples/emoji"
DOCUMENTS = sorted(document for folder in FOLDERS for document in (ROOT / folder).glob("*.md"))


def name_of(document):
    return str(document.relative_to(ROOT))


@pytest.mark.parametrize("name", ["README.md", "docs/results.md", "docs/full-size.md"])
def test_tables_are_those_of_the_results(name):
    text = (ROOT / name).read_text()
    assert text.count("<!-- table: ") == text.count("<!-- end -->") > 0
    assert fill(text, ROOT) == text, "run `make tables`"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_nothing_is_left_to_be_filled_in(document):
    assert "TODO" not in document.read_text()


def test_readme_is_short_and_its_numbers_are_those_of_the_results():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 97
    apart = r"```.*?```|`[^`]*`|<!-- table.*?<!-- end -->|\]\([^)]*\)|^## .*?$|Python 3\.11"
    prose = re.sub(apart, "", text, flags=re.DOTALL | re.MULTILINE)
    numbers = re.findall(r"(?<![\w.-])\d[\d.,]*(?<=\d)", prose)
    assert len(numbers) <= 20
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
