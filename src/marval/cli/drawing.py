"""The verbs that draw: sample, demo, animate and serve."""

import os
import signal
from pathlib import Path

from tyro.conf import Positional

from marval.cli.arguments import load_pipeline, usable_device
from marval.config import Order


def sample(
    model: Positional[str | None] = None,
    *,
    like: Path | None = None,
    classes: str | None = None,
    count: int = 16,
    iterations: int | None = None,
    seed: int = 0,
    order: Order | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    temperature: float | None = None,
    out: Path = Path("samples"),
    device: str = "auto",
) -> None:
    """Draw images: PNG files with their recipes inside, and a grid; or one picture again from its recipe.

    marval sample fashion-student --classes sneaker,bag --count 16 --out samples

    marval sample --like samples/00000-sneaker-0.png --out again

    Args:
        model: a bundled model's name, or a model's or run's folder; with --like, the model that drew the picture, or
            a folder of models; left out, only a bundled one is looked for: a path in a picture is never opened.
        like: a PNG that marval sample or marval serve saved: draw it again, exactly, from the recipe in it.
        classes: names or numbers, separated by commas; all of them when left out.
        count: how many images; the classes take turns.
        iterations: K, the AR iterations; the model's default when left out.
        seed: the first image's seed; the next images count on from it.
        order: in which order tokens are drawn; the model's default when left out.
        steps: T of a teacher's chain.
        guidance: w of a teacher; 1 is no guidance.
        temperature: of a teacher's chain.
        out: a folder for the pictures.
        device: "auto", "cpu", "cuda", "mps", ...
    """
    from marval.io.checkpoint import model_hash
    from marval.io.images import grid, save_picture, square_rows, to_pil
    from marval.pipeline import find_model
    from marval.recipe import KEY, batch_recipes, plain_name

    if like is not None:
        sample_like(like, model, out, device)
        return
    if model is None:
        raise ValueError("name a model, for example: marval sample fashion-student (or a picture with --like)")
    if count < 1:
        raise ValueError(f"--count {count}: expected at least 1")
    pipeline = load_pipeline(model, device).with_chain(steps=steps, guidance=guidance, temperature=temperature)
    names = pipeline.config.class_names
    chosen = pipeline.labels(classes.split(",")) if classes else list(range(len(names)))
    labels = [chosen[i % len(chosen)] for i in range(count)]
    images = pipeline.sample(labels, seed=seed, iterations=iterations, order=order)
    recipes = batch_recipes(model, model_hash(find_model(model)), pipeline, labels, seed, iterations, order)
    for i, (image, recipe) in enumerate(zip(images, recipes, strict=True)):
        name = plain_name(recipe.class_name)
        save_picture(out / f"{i:05d}-{name}-{recipe.seed}.png", to_pil(image), {KEY: recipe.to_json()})
    save_picture(out / "grid.png", grid(square_rows(images), scale=max(1, 84 // images.shape[-1])))
    print(f"{count} images and grid.png in {out}")


def sample_like(like: Path, model: str | None, out: Path, device: str) -> None:
    """Draw the picture in a PNG file again from its recipe, and say whether it is the same."""
    import numpy as np

    from marval.io.images import save_picture, to_pil
    from marval.recipe import KEY, find_pipelines, read_recipe, redraw

    recipe, given = read_recipe(like)
    device = usable_device(device)
    picture = to_pil(redraw(recipe, find_pipelines(model, device)))
    save_picture(out / like.name, picture, {KEY: recipe.to_json()})
    if given.size != picture.size:
        found = f"the file holds {given.width}x{given.height} pixels: it was changed after it was saved"
    else:
        most = np.abs(np.asarray(given.convert(picture.mode), int) - np.asarray(picture, int)).max()
        found = "the same, pixel for pixel" if most == 0 else f"it differs by up to {most} of 255 levels"
    print(f"{out / like.name}: {found}")


def demo(*, out: Path = Path("demo-out"), device: str = "auto") -> None:
    """The main job on the bundled models, in minutes: draw, time and score them, then distil a student live.

    marval demo

    marval demo --out my-demo

    Args:
        out: a folder for the picture and the report.
        device: "auto", "cpu", "cuda", "mps", ...
    """
    from marval.demo import run

    run(out, usable_device(device))


def animate(
    models: Positional[tuple[str, ...]],
    *,
    classes: str | None = None,
    iterations: int = 12,
    seed: int = 0,
    out: Path = Path("unmasking.gif"),
    device: str = "auto",
) -> None:
    """Make an animated GIF of the unmasking: models downwards, classes to the right, with each model's time so far.

    marval animate fashion-teacher fashion-student

    marval animate fashion-student --classes sneaker,bag,dress --iterations 16 --out docs/unmasking.gif

    Args:
        models: bundled models' names, or models' or runs' folders.
        classes: names or numbers, separated by commas; the first six of the first model when left out.
        iterations: K, the AR iterations; one frame for each.
        seed: the first class's seed; the next ones count on from it.
        out: the GIF file.
        device: "auto", "cpu", "cuda", "mps", ...
    """
    from marval.io.images import save_animation
    from marval.unmasking import unmasking_frames

    if not models:
        raise ValueError("name at least one model, for example: marval animate fashion-student")
    pipelines = [load_pipeline(name, device) for name in models]
    chosen = classes.split(",") if classes else pipelines[0].config.class_names[:6]
    frames = unmasking_frames(pipelines, chosen, seed, iterations)
    save_animation(out, frames, [350] * (len(frames) - 1) + [2500])
    print(f"{out}: {len(frames)} frames")


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
        device: "auto", "cpu", "cuda", "mps", ...
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
