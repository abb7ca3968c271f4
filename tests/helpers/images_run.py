"""Draw a tiny teacher's images into a folder, alone or under torchrun: python images_run.py FOLDER COUNT [SLOWLY]."""

import sys
import time
from pathlib import Path

from marval.evaluate import draw
from marval.pipeline import Pipeline
from marval.runtime.distributed import start_workers
from tiny import tiny_config, tiny_model


def main(folder, count, pause):
    with start_workers("cpu") as workers:
        drawing = draw.Drawing(Pipeline(tiny_model(), tiny_config()), count, 3, 2, shard=4)
        draw.claim_folder(folder, {"model": "tiny"}, workers)
        for _ in draw.draw_shards(drawing, folder, workers, report=lambda line: time.sleep(pause)):
            pass
        workers.barrier()
        if workers.main:
            draw.write_npz(drawing, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) > 3 else 0.0)
