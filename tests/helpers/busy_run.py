"""How fast this process trains, draws batches and draws single pictures; beside another, as `test_busy.py` starts it.

Prints "ready" and waits for a line before each of the three, then prints how many it did in a second.
"""

import sys
import time

from marval.cli import wait_passively

wait_passively()  # as the command line does, before torch is there

import torch  # noqa: E402

from marval.data import load_fashion_sample  # noqa: E402
from marval.model import MAR, NoiseSchedule  # noqa: E402
from marval.pipeline import load  # noqa: E402
from marval.presets import TrainConfig  # noqa: E402
from marval.runtime.optim import Optimizer  # noqa: E402
from marval.runtime.rng import generator  # noqa: E402
from marval.spaces import token_space  # noqa: E402
from marval.train.draws import teacher_draws  # noqa: E402
from marval.train.teacher import teacher_config, teacher_loss  # noqa: E402

SECONDS = 6.0  # that each is measured for


def training():
    data, settings = load_fashion_sample(), TrainConfig()
    config = teacher_config("busy", data, "fashion-mnist")
    model = MAR(config.mar).initialize(generator(0))
    optimizer, space, schedule = (
        Optimizer(model, settings.gradient_clip, (0.9, 0.95)),
        token_space(config.space),
        NoiseSchedule.full(),
    )
    indices = torch.arange(settings.batch_size)

    def step():
        tokens, labels = data.tokens(indices, slice(None), space, torch.device("cpu"))
        draws = teacher_draws(settings, config.mar, 0).part(slice(None))
        teacher_loss(model, schedule, tokens, labels, draws, settings.autocast).backward()
        optimizer.step(1e-4)

    return step


def drawing(batch):
    student = load("fashion-student")
    return lambda: student.sample([0] * batch, iterations=8)


for job in (training(), drawing(64), drawing(1)):
    for _ in range(2):
        job()
    print("ready", flush=True)
    sys.stdin.readline()
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        job()
        done += 1
    print(done / (time.perf_counter() - began), flush=True)
