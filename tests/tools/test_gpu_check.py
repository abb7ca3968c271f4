"""tools/gpu_check.py goes through all its parts on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_part_runs_dry(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(ROOT / "tools" / "gpu_check.py"), "--dry-run", "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(out.read_text())
    assert not [name for name, part in found.items() if isinstance(part, dict) and "error" in part]
    assert found["resume"] == {"train": 0.0, "distill": 0.0, "tune": 0.0}
    assert found["gsim_gradients"]["largest relative difference"] == 0.0
    assert max(found["same_pictures"].values()) < 1e-4
    rows = found["sample base"]
    assert {row["role"] for row in rows} == {"student", "teacher", "official loop"}
    assert all(row["ms per image, median"] > 0 for row in rows)
    assert found["gsim base 4"]["images/s"] > 0
