"""Draw with the bundled models: one picture for each class, by the teacher and by its one-step student.

python examples/quickstart.py [FOLDER]
"""

import sys
import time
from pathlib import Path

import marval

out = Path(sys.argv[1] if len(sys.argv) > 1 else "quickstart")
out.mkdir(parents=True, exist_ok=True)

for name in ("fashion-teacher", "fashion-student"):
    model = marval.load(name)  # or the folder of a model that you trained
    began = time.perf_counter()
    pictures = model(model.config.class_names, seed=0, iterations=8)  # PIL images
    print(f"{name}: {len(pictures)} pictures in {time.perf_counter() - began:.2f} s")
    for class_name, picture in zip(model.config.class_names, pictures, strict=True):
        picture.save(out / f"{name}-{class_name}.png")
