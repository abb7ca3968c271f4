"""Score a tiny teacher's images, alone or under torchrun: python columns_run.py COUNT FOLDER OUT."""

import sys
from pathlib import Path

import torch

from marval.evaluate.evaluate import Quality, columns_of, drawings_of
from marval.pipeline import Pipeline
from marval.runtime.distributed import start_workers
from tiny import tiny_config, tiny_model


def main(count, folder, out):
    models = [(None, Pipeline(tiny_model(), tiny_config()))]
    (drawing,) = drawings_of(models, Quality((2,), count, (3,), keep_images=folder))
    with start_workers("cpu") as workers:
        columns = columns_of(drawing, lambda images, labels: {"labels": labels, "images": images}, workers)
        assert bool(columns) == workers.main
        if workers.main:
            torch.save(columns, out)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
