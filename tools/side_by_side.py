"""Put pictures of the same classes side by side: real ones, then those of each model, a panel each.

python tools/side_by_side.py fashion-teacher fashion-student fashion-tuned --out docs/side-by-side.png
"""

import itertools
from pathlib import Path

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from marval.cli.options import run_script
from marval.data import ImageData, load_images
from marval.data.fashion import load_fashion_sample
from marval.io.files import check_output
from marval.io.images import grid, save_picture
from marval.pipeline import load
from marval.runtime.rng import generator


def real_images(data: ImageData, counts: Int[Tensor, " c"], seed: int) -> Float[Tensor, "n c h w"]:
    """Random real images, class after class, so many of each."""
    order = torch.randperm(len(data), generator=generator(seed, "real images"))
    chosen = [order[data.labels[order] == label][:count] for label, count in enumerate(counts.tolist())]
    return data.batch(torch.cat(chosen))[0]


def main(
    models: tuple[str, ...], *, data: str = "", side: int = 8, seed: int = 0, out: Path = Path("panels.png")
) -> None:
    """Draw the same classes and seeds with each model, at its own K and guidance, beside real images.

    Args:
        models: bundled models' names, or models' or runs' folders, all of the real images' classes.
        data: the real images, as in training; the 2,000 of Fashion-MNIST that ship when left out.
        side: pictures along each side of a panel.
        seed: the first picture's seed; the next ones count on from it.
        out: the PNG file.
    """
    check_output(out, folder=False)
    real = load_images(data) if data else load_fashion_sample()
    labels = torch.arange(side**2) * len(real.class_names) // side**2  # class after class
    panels = [grid(real_images(real, labels.bincount(), seed).split(side), title="real images", scale=2)]
    for pipeline in map(load, models):
        images = pipeline.sample([real.class_names[label] for label in labels], seed=seed)
        title = f"{pipeline.config.name}, K = {pipeline.default_iterations}"
        panels.append(grid(images.split(side), title=title, scale=2))
    lefts = list(itertools.accumulate((panel.width + 16 for panel in panels), initial=0))
    canvas = Image.new("RGB", (lefts[-1] - 16, panels[0].height), "white")
    for panel, left in zip(panels, lefts, strict=False):
        canvas.paste(panel, (left, 0))
    save_picture(out, canvas)
    print(f"{out}: {side**2} pictures of each")


if __name__ == "__main__":
    run_script(main)
