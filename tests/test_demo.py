"""`marval demo`, whole (slow: minutes)."""

import json
import subprocess
import sys

import pytest
from PIL import Image


@pytest.mark.slow
def test_the_demo_draws_scores_and_distils(tmp_path):
    out = tmp_path / "demo"
    result = subprocess.run(
        [sys.executable, "-m", "marval", "demo", "--out", str(out)], capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr
    assert "marval serve" in result.stdout.rstrip().splitlines()[-1]
    report = json.loads((out / "demo.json").read_text())
    rows = {(row["model"], row["iterations"]): row for row in report["rows"]}
    teacher, student = rows["fashion-teacher", 16], rows["fashion-student", 4]
    assert teacher["seconds_alone"] > 20 * student["seconds_alone"]
    assert teacher["seconds_in_batch"] > 10 * student["seconds_in_batch"]
    distances = [row["fd"] for row in report["live_distillation"]]
    assert distances[-1] < 0.7 * distances[0]
    for name in ("demo.png", "distillation.png"):
        assert Image.open(out / name).width > 300
        assert name in result.stdout
