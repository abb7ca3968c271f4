"""One tiny training run of a stage, alone or under torchrun: python parallel_run.py STAGE OUT UPDATES [--resume]."""

import dataclasses
import errno
import sys
import time
from math import nan
from pathlib import Path

from marval.evaluate.draw import draw_bytes
from marval.io import files
from marval.rewards import WeightedReward
from marval.runtime.distributed import start_workers
from marval.runtime.folder import open_run
from marval.train.distill import distill
from marval.train.teacher import train_teacher
from marval.train.tune import tune
from tiny import tiny_config, tiny_data, tiny_model
from training import DISTILL, STUDENT, TRAIN, TUNE, anchor_of, brightness, distance_reward

SETTINGS = {
    "train": dataclasses.replace(TRAIN, warmup=3, decay=4),
    "distill": dataclasses.replace(DISTILL, warmup=2, decay=1, probe_every=10),  # decay 1: a longer run begins alike
    "tune": dataclasses.replace(
        TUNE, batch_size=8, gradient_iterations=3, probe_every=10, max_distance_ratio=1e9, min_diversity_ratio=0.0,
        patience=99,
    ),
}  # fmt: skip
SETTINGS["cached"] = dataclasses.replace(SETTINGS["distill"], cached=True, guidance_range=(1.0, 4.0))
SETTINGS["distance"] = dataclasses.replace(SETTINGS["tune"], updates=20, moments_warmup=3, iterations=(4, 2))
SETTINGS["joint"] = dataclasses.replace(SETTINGS["tune"], joint_draw=True)
SETTINGS["anchored"] = dataclasses.replace(SETTINGS["tune"], updates=20, anchor=0.5, anchor_warmup=3)


def broken(images, prompts):
    return brightness(images, prompts) * nan


def hamper_writing(seconds, full):
    """Let each file of tensors take its time to be written; of the state after 8 updates, refuse it on a full disk."""
    write = files.save_file

    def hampered(tensors, file, metadata):
        time.sleep(seconds)
        if full and "state-00000008" in str(file):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, file, metadata)

    files.save_file = hampered


def main(stage, out, resume, broken_rank=None, full_rank=None, shard=0, slow=0, **changes):
    # Batches of 8: of three processes, two have 3 images and one has 2.
    settings = dataclasses.replace(SETTINGS[stage], save_every=changes.pop("save_every", 4), **changes)
    with start_workers("cpu", bool(shard)) as workers, open_run(out, resume=resume, workers=workers) as run:
        hamper_writing(slow, full_rank == workers.rank)

        def probe(pipeline):
            images, _ = draw_bytes(pipeline, 7, 4, seed=0, workers=workers)
            return {"fd": 1.0, "diversity": 1.0, "log_probability": float(images.float().mean())}

        if stage == "train":
            train_teacher(tiny_config(), settings, tiny_data(), run)
        elif stage in ("distill", "cached"):
            distill(tiny_model(), tiny_config(), settings, tiny_data(), run, probe=probe)
        else:
            rewards = {"mine": (broken if broken_rank == workers.rank else brightness, 1.0)}
            rewards |= {"fd:pixels": (distance_reward(turns=2), 1.0)} if stage == "distance" else {}
            reward = WeightedReward(rewards)
            anchor = anchor_of() if stage == "anchored" else None
            tune(tiny_model(), STUDENT, reward, settings, run, probe=probe, anchor=anchor)


if __name__ == "__main__":
    flags = sys.argv[4:]
    numbers = {name: int(value) for name, _, value in (flag.partition("=") for flag in flags if "=" in flag)}
    for name in {"checkpoint_blocks", "autocast"} & numbers.keys():
        numbers[name] = bool(numbers[name])
    main(sys.argv[1], Path(sys.argv[2]), "--resume" in flags, updates=int(sys.argv[3]), **numbers)
