"""Distil and tune students of `fashion-teacher` side by side on one GPU, each within its time: the study's long runs.

    python tools/students.py runs/students --minutes 9 --device cuda
    python tools/students.py runs/students --minutes 9 --device cuda --chains plain cached

A chain is a row of `marval` commands, whose words go to OUT/CHAIN.txt. A command whose time is over is asked to stop:
it saves its state and leaves its model. Distillation has 42 % of the time at a steady rate, then 12 % in which the rate
falls to 0; tuning has the rest. Models are left in OUT/RUN/model, and in half precision in OUT/half. Options that are
not this script's go to every command (`--batch-size 8` for a rehearsal on a CPU).
"""

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import marval
from marval.runtime.folder import saved_states

TOOLS = Path(__file__).resolve().parent
STEADY, DECAY = 0.42, 0.12  # shares of the time
GSIM = shlex.split("""--guidance 1.25 --energy 1 --batch-size 256 --learning-rate 2e-4 --auxiliary-learning-rate 2e-4
    --probe-samples 0 --save-every 500 --log-every 20""")
DISTANCE = shlex.split("""--reward fd:efficientnet=1,fd:pixels=0.3,fd:classifier=0.2 --batch-size 512
    --gradient-iterations 2 --moments-decay 0.85 --ema-decay 0.995 --updates 100000 --probe-every 40 --save-every 100
    --patience 100000 --min-diversity-ratio 0 --max-distance-ratio inf""")


class Chain:
    """Commands that follow each other, in one run of this script."""

    def __init__(self, name: str, out: Path, seconds: float, device: str, more: list[str]):
        self.name, self.out, self.seconds, self.device, self.more = name, out, seconds, device, more
        self.began = time.perf_counter()

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.began

    def run(self, command: list[str], until: float) -> None:
        """Run a command, and ask it to stop at a time."""
        if self.now >= until:
            return
        with (self.out / f"{self.name}.txt").open("a") as log:
            process = subprocess.Popen([sys.executable, *command, *self.more], stdout=log, stderr=log)
            try:
                code = process.wait(until - self.now)
            except subprocess.TimeoutExpired:
                process.terminate()
                code = process.wait()
        print(f"{self.now:6.0f} s  {self.name}: ended with {code}: {' '.join(command[:3])}", flush=True)
        if code:
            raise ValueError(f"{self.name}: a command failed, {log.name} says why")

    def distilled(self, *options: str, contexts: tuple[str, ...] = ()) -> Path:
        """Distil, at a steady rate and then with one that falls to 0; the run's folder."""
        script = [str(TOOLS / "contexts.py"), *contexts] if contexts else ["-m", "marval"]
        out, began = self.out / f"{self.name}-distilled", self.now
        command = [*script, "distill", "fashion-teacher", *GSIM, "--name", self.name, "--device", self.device, *options]
        command += ["--out", str(out)]
        self.run([*command, "--updates", "1000000", "--decay", "1"], STEADY * self.seconds)
        done = updates_in(out)
        more = max(1, int(done / (self.now - began) * DECAY * self.seconds))
        self.run([*command, "--updates", str(done + more), "--decay", str(more), "--resume"], self.seconds)
        return out

    def tuned(self, student: Path | str, iterations: str, learning_rate: str, *options: str) -> None:
        """Tune a student's distance to the real images for the rest of the time, with these K in turn."""
        command = ["-m", "marval", "tune", str(student), *DISTANCE, "--iterations", *iterations.split()]
        command += ["--learning-rate", learning_rate, "--name", self.name, "--device", self.device, *options]
        self.run([*command, "--out", str(self.out / f"{self.name}-tuned")], self.seconds)


def updates_in(folder: Path) -> int:
    """How many updates a run's last state has; 0 without one."""
    return max((int(state.name.partition("-")[2]) for state in saved_states(folder)), default=0)


CHAINS: dict[str, Callable[[Chain], object]] = {
    "plain": lambda chain: chain.tuned(chain.distilled(), "4 8 2 16", "2e-5", "--joint-draw"),
    "cached": lambda chain: chain.tuned(chain.distilled("--cached"), "4 8 2 16", "2e-5", "--joint-draw"),
    "own": lambda chain: chain.distilled(contexts=("--own", "0.5")),
    "longer": lambda chain: chain.tuned("fashion-student", "8 4 2 16", "1e-5"),
    "few": lambda chain: chain.tuned("fashion-student", "4 2 1 8", "3e-5"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--chains", nargs="+", choices=CHAINS, default=list(CHAINS))
    given, more = parser.parse_known_args()  # what else is typed goes to every command
    given.out.mkdir(parents=True, exist_ok=True)
    chains = [Chain(name, given.out, given.minutes * 60, given.device, more) for name in given.chains]
    with ThreadPoolExecutor(len(chains)) as pool:
        jobs = [pool.submit(CHAINS[chain.name], chain) for chain in chains]
    for run in sorted(given.out.glob("*/model")):
        marval.load(run).save(given.out / "half" / run.parent.name, torch.float16)
    if failed := [str(job.exception()) for job in jobs if job.exception()]:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
