"""Scripts of tests, and marval itself, run alone or by several processes under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
MARVAL = [sys.executable, "-m", "marval"]


def python(processes, *arguments):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *(launcher if processes > 1 else []), *map(str, arguments)]


def command(script, processes, *arguments):
    return python(processes, FOLDER / script, *arguments)


def environment():
    path = os.pathsep.join([str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def launch(script, processes, *arguments, timeout=300):
    done = subprocess.run(
        command(script, processes, *arguments), env=environment(), capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-3000:]


def marval(*arguments, cwd, processes=1):
    command = python(processes, "-m", "marval", *arguments)
    env = {**environment(), "XDG_CACHE_HOME": str(cwd / "cache"), "NO_COLOR": "1", "COLUMNS": "200"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
