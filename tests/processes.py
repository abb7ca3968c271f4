"""Scripts of tests run alone or by several processes under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def command(script, processes, *arguments):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *(launcher if processes > 1 else []), str(FOLDER / script), *map(str, arguments)]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER)}


def launch(script, processes, *arguments, timeout=300):
    done = subprocess.run(
        command(script, processes, *arguments), env=environment(), capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-3000:]
