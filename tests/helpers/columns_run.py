"""Judge a tiny teacher's images, alone or under torchrun: python columns_run.py COUNT FOLDER OUT."""

import sys
from pathlib import Path

import torch

from marval.evaluate.evaluate import KeepImages, evaluations_of
from marval.pipeline import Pipeline
from marval.runtime.distributed import start_workers
from tiny import tiny_config, tiny_model


def main(count, folder, out):
    pipeline = Pipeline(tiny_model(), tiny_config())
    models = [(Path(), pipeline)]
    (evaluation,) = evaluations_of(models, ["hash"], iterations=(2,), samples=count, seeds=(3,), autocast=False)
    with start_workers("cpu") as workers:
        judge = lambda images, labels: {"labels": labels, "images": images}  # noqa: E731
        columns = evaluation.columns(judge, KeepImages(folder), workers, lambda line: None)
        assert bool(columns) == workers.main
        if workers.main:
            torch.save(columns, out)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
