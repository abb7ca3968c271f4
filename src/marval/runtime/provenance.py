"""What made a result: the command as typed, the commit, the machine, versions."""

import contextlib
import functools
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGES = ("marval", "torch", "numpy", "torch-fidelity")


def command_line() -> str:
    """Return the command as typed: marval, or a script in tools/ or examples/."""
    script = Path(sys.argv[0])
    folder = next((folder for folder in script.parents if folder.name in ("tools", "examples")), None)
    program = ["marval"] if folder is None else ["python", script.relative_to(folder.parent).as_posix()]
    return shlex.join([*program, *sys.argv[1:]])


@functools.cache
def commit() -> str:
    """Return the commit of the running code, with "-dirty" where the package's code differs from it."""

    def git(*arguments: str) -> str:
        package = Path(__file__).parents[1]
        return subprocess.run(
            ["git", *arguments], cwd=package, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "config.py")  # installed in somebody else's checkout, it is not of it
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", "*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return "not a checkout"


def made_by(device: "torch.device", processes: int = 1) -> dict[str, Any]:
    """Describe how a row was made: command, commit, device, processes and threads, installed versions."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "command": command_line(),
        "commit": commit(),
        "device": f"{device.type} ({name})",
        "processes": processes,
        "threads": torch.get_num_threads(),
        "versions": versions,
    }
