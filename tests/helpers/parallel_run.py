"""One tiny training run of a stage, alone or under torchrun: python parallel_run.py STAGE OUT STEPS [--resume]."""

import dataclasses
import sys
from math import nan
from pathlib import Path

from marval.config import OneStep
from marval.evaluate.draw import draw_bytes
from marval.presets import DistillConfig, TrainConfig, TuneConfig
from marval.rewards import WeightedReward
from marval.runtime import state
from marval.runtime.distributed import start_workers
from marval.runtime.folder import open_run
from marval.train.anchor import Anchor
from marval.train.distill import distill
from marval.train.teacher import train_teacher
from marval.train.tune import tune
from tiny import tiny_config, tiny_data, tiny_model

state.FILE_BYTES = 20_000  # states in several files, as those of large networks
COMMON = {"batch_size": 8, "log_every": 1, "save_every": 4}  # of three processes, two have 3 images and one has 2
TRAIN = TrainConfig(**COMMON, tokens_per_image=6, warmup=3, decay=4, autocast=False)
DISTILL = DistillConfig(
    **COMMON, tokens_per_image=6, warmup=2, decay=1, autocast=False, guidance=1.5, probe_every=10
)  # fmt: skip
FINETUNE = TuneConfig(
    **COMMON, iterations=4, gradient_iterations=3, learning_rate=1e-3, probe_every=10, max_distance_ratio=1e9,
    min_diversity_ratio=0.0, patience=99, autocast=False,
)  # fmt: skip


def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))


def main(stage, out, steps, resume, **changes):
    config, data = tiny_config(), tiny_data()
    student = dataclasses.replace(config, draw=OneStep())
    with start_workers("cpu") as workers, open_run(out, resume=resume, workers=workers) as run:

        def probe(pipeline):
            images, _ = draw_bytes(pipeline, 7, 4, seed=0, workers=workers)
            bright = float(images.float().mean())
            return {"fd": 1.0, "diversity": 1.0, "log_probability": bright}

        changes["updates"] = steps
        if "checkpoint_blocks" in changes:
            changes["checkpoint_blocks"] = bool(changes["checkpoint_blocks"])
        if stage == "train":
            train_teacher(config, dataclasses.replace(TRAIN, **changes), data, run)
        elif stage == "distill":
            distill(tiny_model(), config, dataclasses.replace(DISTILL, **changes), data, run, probe=probe)
        else:
            anchor = None
            if stage == "anchored":
                changes |= {"anchor": 0.5, "anchor_warmup": 3}
                anchor = Anchor(tiny_model(1), data, DISTILL.with_guidance_of(config.draw))
            reward = WeightedReward({"mine": (brightness, 1.0)})
            if changes.pop("broken_rank", None) == workers.rank:
                reward = WeightedReward({"mine": (lambda images, prompts: brightness(images, prompts) * nan, 1.0)})
            settings = dataclasses.replace(FINETUNE, **changes)
            tune(tiny_model(), student, reward, settings, run, probe=probe, anchor=anchor)


if __name__ == "__main__":
    flags = sys.argv[4:]
    given = {name: int(value) for name, _, value in (flag.partition("=") for flag in flags if "=" in flag)}
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), "--resume" in flags, **given)
