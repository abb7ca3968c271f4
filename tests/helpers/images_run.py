"""Draw a tiny teacher's images into a folder, alone or under torchrun: python images_run.py FOLDER COUNT [SLOWLY]."""

import sys
import time
from pathlib import Path

from marval.evaluate import images
from marval.pipeline import Pipeline
from marval.runtime.distributed import start_workers
from tiny import tiny_config, tiny_model


def main(folder, count, pause):
    with start_workers("cpu") as workers:
        pipeline = Pipeline(tiny_model(), tiny_config())
        drawn = images.claim_folder(folder, {"model": "tiny"}, count, shard=4, workers=workers)
        for _ in images.draw_shards(
            pipeline, count, 3, 2, into=drawn, workers=workers, report=lambda line: time.sleep(pause)
        ):
            pass
        workers.barrier()
        images.write_pngs(drawn, workers)
        if workers.main:
            images.write_npz(drawn)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) > 3 else 0.0)
