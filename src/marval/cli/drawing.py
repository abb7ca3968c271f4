"""The verbs that draw: sample, demo and serve."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional, UseAppendAction

from marval.cli.arguments import load_pipeline, usable_device
from marval.config import Order

if TYPE_CHECKING:
    from torch import Tensor

TOGETHER = 64  # images drawn at a time
IN_GRID = 100  # images that the grid shows


def sample(
    model: Positional[str | None] = None,
    *,
    like: Path | None = None,
    classes: UseAppendAction[tuple[str, ...]] = (),
    count: int = 16,
    iterations: int | None = None,
    seed: int = 0,
    order: Order | None = None,
    diffusion_steps: int | None = None,
    guidance: float | None = None,
    temperature: float | None = None,
    batch_size: int | None = None,
    out: Path = Path("samples"),
    force: bool = False,
    device: str = "auto",
) -> None:
    """Draw images: PNG files with their recipes inside, and a grid; or one picture again from its recipe.

    marval sample fashion-student --classes sneaker,bag --count 16 --out samples

    marval sample --like samples/00000-sneaker-0.png --out again

    Args:
        model: a bundled model's name, or a model's or run's folder; with --like, the model that drew the picture, or
            a folder of models; left out, only a bundled one is looked for: a path in a picture is never opened.
        like: a PNG that marval sample or marval serve saved: draw it again, exactly, from the recipe in it.
        classes: names or numbers with commas between them; or the option again for each name, which may hold commas
            then (--classes "salt, pepper" --classes 7); all classes when left out. A name goes before a number.
        count: how many images; the classes take turns.
        iterations: K, the AR iterations; the model's default when left out.
        seed: the first image's seed; the next images count on from it.
        order: in which order tokens are drawn; the model's default when left out.
        diffusion_steps: T of a teacher's chain.
        guidance: w of a teacher; 1 is no guidance.
        temperature: of a teacher's chain.
        batch_size: images drawn together, which their recipes record; 64, or 50 of latents, when left out.
        out: a folder for the pictures, which are saved batch by batch. Files that are there are kept: the command
            refuses to replace them.
        force: replace them.
        device: "auto", "cpu", "cuda", ...
    """
    import torch

    from marval.evaluate.images import DRAWN
    from marval.io.checkpoint import model_hash
    from marval.io.images import grid, save_picture, square_rows, to_pil
    from marval.pipeline import find_model
    from marval.recipe import KEY, batch_recipes, plain_name
    from marval.runtime.progress import progress
    from marval.sampling import draw_counts

    if like is not None:
        sample_like(like, model, out, device, force)
        return
    if model is None:
        raise ValueError("name a model, for example: marval sample fashion-student (or a picture with --like)")
    if count < 1 or (batch_size is not None and batch_size < 1):
        raise ValueError(f"--count {count} --batch-size {batch_size}: expected at least 1 of each")
    pipeline = load_pipeline(model, device).with_chain(
        diffusion_steps=diffusion_steps, guidance=guidance, temperature=temperature
    )
    names = pipeline.config.class_names
    chosen = pipeline.listed_labels(classes) if classes else list(range(len(names)))
    labels = [chosen[i % len(chosen)] for i in range(count)]
    if iterations is not None:
        draw_counts(pipeline.config.mar.num_tokens, iterations)  # refuses it before anything is made
    together = batch_size or min(TOGETHER, DRAWN[pipeline.config.space.kind])
    recipes = batch_recipes(model, model_hash(find_model(model)), pipeline, labels, seed, iterations, order, together)
    files = [out / f"{i:05d}-{plain_name(r.class_name)}-{r.seed}.png" for i, r in enumerate(recipes)]
    check_targets([*files, out / "grid.png"], force)
    shown: list[Tensor] = []
    with progress(count, "drawing images") as advance:
        for start in range(0, count, together):
            rows = slice(start, start + together)
            images = pipeline.sample(
                labels[rows], seed=seed + start, iterations=iterations, order=order, batch_size=together
            )
            for file, image, recipe in zip(files[rows], images, recipes[rows], strict=True):
                save_picture(file, to_pil(image), {KEY: recipe.to_json()})
            shown += images[: max(0, IN_GRID - start)]
            advance(len(images))
    save_picture(out / "grid.png", grid(square_rows(torch.stack(shown)), scale=max(1, 84 // shown[0].shape[-1])))
    first = f" (the first {IN_GRID})" if count > IN_GRID else ""
    print(f"{count} image{'s' if count > 1 else ''} and grid.png{first} in {out}")


def check_targets(files: Sequence[Path], force: bool) -> None:
    """Refuse to replace files that this run did not make, and a folder that cannot be written to.

    Raises:
        ValueError: some of the files are there and `force` is off, or they cannot be written.
    """
    from marval.io.files import check_output

    there = [file for file in files if file.exists()]
    if there and not force:
        raise ValueError(
            f"{there[0]} is there already{f', and {len(there) - 1} more files' if len(there) > 1 else ''}: choose "
            "another --out, or replace with --force"
        )
    check_output(files[0], folder=False)


def sample_like(like: Path, model: str | None, out: Path, device: str, force: bool) -> None:
    """Draw the picture in a PNG file again from its recipe, and say whether it is the same.

    The file itself is never replaced, so that what was to be checked stays.

    Raises:
        ValueError: `out` is the file's own folder and the picture differs, or holds another file of its name.
    """
    import numpy as np

    from marval.io.images import save_picture, to_pil
    from marval.recipe import KEY, find_pipelines, read_recipe, redraw

    recipe, given = read_recipe(like)
    device, target = usable_device(device), out / like.name
    itself = target.exists() and target.samefile(like)
    if not itself:
        check_targets([target], force)
    picture = to_pil(redraw(recipe, find_pipelines(model, device)))
    if given.size != picture.size:
        same, found = False, f"the file holds {given.width}x{given.height} pixels: it was changed after it was saved"
    else:
        most = np.abs(np.asarray(given.convert(picture.mode), int) - np.asarray(picture, int)).max()
        same = most == 0
        found = "the same, pixel for pixel" if same else f"it differs by up to {most} of 255 levels"
    if itself and not same:
        raise ValueError(f"{like}: {found}; nothing was written over it: name another folder with --out")
    if not itself:
        save_picture(target, picture, {KEY: recipe.to_json()})
    print(f"{target}: {found}")


def demo(*, out: Path = Path("demo-out"), device: str = "auto") -> None:
    """The main job on the bundled models, in minutes: draw, time and score them, then distil a student live.

    marval demo

    marval demo --out my-demo

    Args:
        out: a folder for the picture and the report.
        device: "auto", "cpu", "cuda", ...
    """
    from marval.cli.demo import run

    run(out, usable_device(device))


def serve(
    models: Positional[tuple[str, ...]],
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    auth: str | None = None,
    browser: bool = False,
    device: str = "auto",
) -> None:
    """Open a web page that draws, edits and compares pictures; it works offline, and only this machine reaches it.

    marval serve

    marval serve runs/mine runs/student --port 8000 --browser

    Args:
        models: bundled models' names, or models' or runs' folders; the bundled models when left out.
        host: the address to listen on; 0.0.0.0 lets other machines in: then say who, with --auth.
        port: the port to listen on.
        auth: ask visitors for this name:password. Others on this machine may see it in the list of processes, but not
            in the variable MARVAL_AUTH, which is taken where this is left out. The page speaks http: beyond a network
            that you trust, put a proxy with https before it.
        browser: open the page in a browser.
        device: "auto", "cpu", "cuda", ...
    """
    try:
        from marval.page.app import check_address, check_auth
        from marval.page.app import serve as run
    except ImportError as error:
        raise ValueError(f"the page needs gradio ({error}): pip install 'gradio>=6.31,<7'") from None
    from marval.page.studio import Studio

    names = models or ("fashion-teacher", "fashion-student", "fashion-tuned")
    auth = os.environ.get("MARVAL_AUTH") if auth is None else auth
    check_address(host, port)
    check_auth(auth)
    studio = Studio.open(names, usable_device(device))
    page, address = run(studio, host, port, browser, auth)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that uploads are removed
    print(f"marval is on {address}  (Ctrl-C ends it)", flush=True)
    if host in ("0.0.0.0", "::") and auth is None:
        print("everybody who reaches this machine can draw: --auth name:password asks for a password", flush=True)
    try:
        page.block_thread()
    finally:
        studio.worker.shutdown(wait=False, cancel_futures=True)  # what waits for its turn is not drawn any more
