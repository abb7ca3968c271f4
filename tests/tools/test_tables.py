"""tools/tables.py: tables of results files, and the documents whose tables they are."""

import json

import pytest

from marval.evaluate.results import write_results
from result_rows import quality, teacher, timed, write
from tables import TABLES, fill, recorded


def table(kind, *files):
    return TABLES[kind][0](recorded(*files))


def measured(**changes):
    return {"efficientnet_recall": 0.5, "diversity": 49.04, "gflops_per_image": 0.78, "features": "E", **changes}


def test_a_document_is_filled_and_says_which_commands_made_its_tables(tmp_path):
    other = measured(made={"command": "marval evaluate t", "commit": "d" * 40})
    write(tmp_path / "r.json", [quality(**measured()), quality(seed=1, fd=11.0, **other)])
    text = fill("a\n<!-- table: models r.json -->\nold\n<!-- end -->\nb", tmp_path)
    assert "old" not in text
    assert "| s | 8 | 10.5 | 0.50 | 49.0 | 0.900 | 0.8 |" in text  # the mean of both seeds
    assert text.startswith("a\n<!-- table: models r.json -->\n")
    assert text.endswith("<!-- end -->\nb")
    assert "- quality: `marval evaluate s` at commit ccccccc\n- quality: `marval evaluate t` at" in text
    assert fill(text, tmp_path) == text
    with pytest.raises(ValueError, match="unknown table nonsense"):
        fill("<!-- table: nonsense r.json --><!-- end -->", tmp_path)
    with pytest.raises(ValueError, match=r"none\.json is not there"):
        fill("<!-- table: models r.json none.json --><!-- end -->", tmp_path)


def test_one_table_joins_the_distances_of_two_spaces_and_times(tmp_path):
    """Teachers come first and are what times are compared with; a GPU's times meet no CPU's."""
    rows = [quality(k=k, fd=90.0, **measured()) for k in (8, 4)] + [teacher(16, 100, 127.4, **measured())]
    judge = [{**row, **measured(features="judge (abc), last", fd=0.3123, diversity=2.0)} for row in rows[:2]]
    here, there = ({"made": {"device": name, "threads": 1}} for name in ("cpu", "cuda"))
    times = [timed(rows[1], 9.0) | there, *(timed(row, s) | here for row, s in ((rows[2], 0.5), (rows[0], 0.02)))]
    times.append(timed(rows[0], 0.002, batch=64) | here)
    files = write(tmp_path / "a.json", rows), write(tmp_path / "b.json", judge), tmp_path / "c.json"
    write_results(files[2], "timing", times)
    header, _, first, few, more = table("models", *files).splitlines()
    assert header.startswith("| model | K | FD on E | FD on judge | recall | diversity |")
    assert header.endswith("| ms / image, batch 1 | ms / image, batch 64 |")
    assert first == "| t | 16 | 127 |  | 0.50 | 49.0 | 0.900 | 0.8 | 500 |  |"
    assert few == "| s | 4 | 90 | 0.312 | 0.50 | 49.0 | 0.900 | 0.8 |  |  |"
    assert more == "| s | 8 | 90 | 0.312 | 0.50 | 49.0 | 0.900 | 0.8 | 20 (25x) | 2 |"
    assert table("brief", *files).splitlines()[2:] == ["| t | 16 | 127 |  | 500 |", "| s | 4 | 90 | 0.312 |  |"]


def test_times_with_operations_become_a_table(tmp_path):
    """Rows of today, and those of the former bench, which knew the context network's share."""
    row = timed(teacher(4, 100, 1.0), 2.0, batch=2) | {"gflops_per_image": 6033.6, "fraction_of_peak": 0.586}
    faster = timed(quality(k=4), 0.5, batch=2) | {"gflops_per_image": 2957.6, "fraction_of_peak": 0.586}
    write_results(tmp_path / "b.json", "timing", [row, faster])
    text = table("bench", tmp_path / "b.json")
    assert "| t | 4 | 2 | 2.0 | 6,034 | 59% |  |  |" in text
    assert "| s | 4 | 2 | 0.5 | 2,958 | 59% | 4.0x | 2.0x |" in text
    (tmp_path / "b.json").write_text(json.dumps({"bench": {"rows": [row | {"context_seconds": 0.5}]}}))
    assert "| t | 4 | 2 | 2.0 | 25% | 6,034 | 59% |  |  |" in table("bench", tmp_path / "b.json")


def test_what_a_judge_tells_of_pairs_becomes_a_table(tmp_path):
    told = {"concept": 0.916, "style": 0.874, "both": 0.8, "own_distance": 0.088, "nearest_distance": 0.0871}
    figures = {f"{group}_{name}": value for group in ("seen", "held_out") for name, value in told.items()}
    rows = [{"model": "drawings", "iterations": 0, **figures}, {"model": "t", "iterations": 16, **figures}]
    rows[1]["held_out_concept"] = 0.5
    write_results(tmp_path / "p.json", "pairs", rows)
    header, _, drawings, teacher = table("pairs", tmp_path / "p.json").splitlines()
    assert header.startswith(
        "| pictures | K | seen pairs: concept, style, both | held-out pairs: concept, style, both |"
    )
    assert drawings == "| drawings |  | 92% / 87% / 80% | 92% / 87% / 80% | 0.088 / 0.087 | 0.088 / 0.087 |"
    assert teacher == "| t | 16 | 92% / 87% / 80% | 50% / 87% / 80% | 0.088 / 0.087 | 0.088 / 0.087 |"
