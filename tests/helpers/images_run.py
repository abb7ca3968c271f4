"""Draw a tiny teacher's images into a folder, alone or under torchrun: python images_run.py FOLDER COUNT [SLOWLY]."""

import sys
import time
from pathlib import Path

from marval.evaluate import draw
from marval.pipeline import Pipeline
from marval.runtime.distributed import start_workers
from tiny import tiny_config, tiny_model


def main(folder, count, pause):
    pipeline = Pipeline(tiny_model(), tiny_config())
    with start_workers("cpu") as workers:
        drawing = draw.Drawing(pipeline, count, 3, 2, folder=folder, key={"model": "tiny"}, shard=4)
        draw.claim_folder(drawing, workers)
        for _ in draw.draw_shards(drawing, workers):
            time.sleep(pause)
        workers.barrier()
        if workers.main:
            draw.write_npz(drawing, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) > 3 else 0.0)
