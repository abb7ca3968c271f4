"""The verbs that draw and measure: sample, evaluate, bench, demo, animate and serve."""

from pathlib import Path
from typing import Literal, cast, get_args

from tyro.conf import Positional

from marval.cli.arguments import judge_for, load_models, load_pipeline, usable_device
from marval.cli.measuring import show_curve
from marval.config import FinetuneConfig, Order, Size

REAL_SAMPLE = 10_000  # real images that KID, precision and recall are measured on


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
        model: a bundled model's name, or a model's or run's folder; with --like, where the recipe's model is now.
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
    from marval.recipe import KEY, batch_recipes

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
        name = recipe.class_name.replace(" ", "-").replace("/", "-")
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


def evaluate(
    models: Positional[tuple[str, ...]],
    *,
    iterations: tuple[int, ...] = (),
    samples: int = 10_000,
    batches: tuple[int, ...] = (1, 64),
    repeats: int = 5,
    steps: tuple[int, ...] = (),
    guidance: tuple[float, ...] = (),
    data: str | None = None,
    judge: Path | None = None,
    features: str | None = None,
    reference: Path | None = None,
    rewards: str | None = None,
    prompt: str = FinetuneConfig().prompt,
    seed: tuple[int, ...] = (0,),
    autocast: bool = False,
    images: Path | None = None,
    image_format: Literal["shards", "png", "npz"] = "shards",
    out: Path = Path("results/evaluate.json"),
    device: str = "auto",
) -> None:
    """Measure models: Frechet distance, KID, precision and recall, held-out accuracy, time and FLOPs per image.

    marval evaluate fashion-teacher fashion-student --iterations 4 8 16 32 --samples 2000 --seed 0 1 2

    marval evaluate runs/marval-base --samples 50000 --images drawn --reference imagenet256.npz --batches

    Args:
        models: bundled models' names, or models' or runs' folders.
        iterations: the numbers K of AR iterations; each model's default when left out.
        samples: images for the figures of quality (the real set's training split is the reference).
        batches: batch sizes to time at, interleaved over all models; none: no timing.
        repeats: timed rounds.
        steps: T of the teachers' chains, one or several.
        guidance: w of the teachers, one or several; 1 is no guidance.
        data: the real images; those of the model when left out.
        judge: the held-out classifier; the bundled one for Fashion-MNIST when left out.
        features: package.module:function, byte images (B, C, H, W) to features (B, F), in EfficientNet's place.
        reference: a file in the real images' place: ADM's .npz (FID, IS, sFID, precision and recall by torch-fidelity)
            or marval's statistics .safetensors.
        rewards: measure these instead, over the prompts of all classes: "clip,image-reward" (see marval rewards).
        prompt: what an image's prompt is, with {} for its class's name.
        seed: of the samples; several: a row for each, and their spread.
        autocast: draw the samples for quality in bf16 (the result says so; times are always float32).
        images: a folder that keeps the images; a run that was killed goes on there.
        image_format: besides shards, png files or one npz in ADM's format (arr_0).
        out: the JSON file; rows that it holds already are not drawn again.
        device: "auto", "cpu", "cuda", "mps", ...
    """
    import signal

    from marval.evaluate.evaluate import KeepImages, time_models
    from marval.evaluate.evaluate import evaluate as run
    from marval.evaluate.rewards import evaluate_rewards
    from marval.evaluate.tables import print_table
    from marval.parallel import start_workers
    from marval.rewards import find_reward

    with start_workers(usable_device(device)) as workers:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # finished shards and rows are whole: nothing to save
        loaded = load_models(models, str(workers.device), steps, guidance)
        if rewards is not None:
            found = {name.strip(): find_reward(name.strip(), device=workers.device) for name in rewards.split(",")}
            evaluate_rewards(
                loaded, found, prompt=prompt, iterations=iterations, samples=samples, out=out, seeds=seed,
                autocast=autocast, workers=workers,
            )  # fmt: skip
            return
        judged = judge_for(loaded[0][1], data, judge, features=features, sample=REAL_SAMPLE, reference=reference)
        run(
            loaded, judged, iterations=iterations, samples=samples, out=out, seeds=seed, autocast=autocast,
            keep=None if images is None else KeepImages(images, image_format), workers=workers,
        )  # fmt: skip
        if batches and workers.main:
            time_models(loaded, iterations=iterations, batches=batches, repeats=repeats, out=out)
        if workers.main:
            print_table(out)


def bench(
    models: Positional[tuple[str, ...]],
    *,
    iterations: tuple[int, ...] = (),
    batches: tuple[int, ...] = (),
    steps: tuple[int, ...] = (),
    guidance: tuple[float, ...] = (),
    repeats: int = 3,
    samples: int = 0,
    seed: tuple[int, ...] = (0,),
    plot: Path | None = None,
    autocast: bool = False,
    compiled: bool = False,
    out: Path = Path("results/bench.json"),
    device: str = "auto",
) -> None:
    """Time models against the arithmetic that they need and the machine's peak.

    marval bench imagenet256-base

    marval bench fashion-teacher fashion-student --iterations 4 8 --steps 100 50 25 10 --samples 2000 --plot curve.png

    Args:
        models: models' names or folders, a teacher first; or imagenet256-base, -large, -huge: a full-size teacher and
            its student with random weights.
        iterations: the numbers K of AR iterations; each model's default when left out (64 at full size).
        batches: batch sizes; 1 and the best of each model when left out (at full size 1 and 4 on a CPU, 1 and the
            largest that fits elsewhere).
        steps: T of the teachers' chains, one or several: fewer steps are the plain way to be faster.
        guidance: w of the teachers, one or several.
        repeats: timed rounds after one that warms up; 0: only that one, for runs of many minutes.
        samples: images of each (model, K, T, w) for the quality; 0: none is measured.
        seed: of those images; several: their mean.
        plot: a picture of quality against time per image (needs `samples` in this or an earlier run, and `plots`).
        autocast: draw in bf16.
        compiled: use torch.compile.
        out: the JSON file.
        device: "auto", "cpu", "cuda", "mps", ...
    """
    from marval.bench import bench as run
    from marval.bench import largest_batch, random_pair
    from marval.evaluate.evaluate import evaluate as measure
    from marval.evaluate.plots import need_matplotlib
    from marval.evaluate.throughput import complete, summary, worthwhile_batches

    if not models:
        raise ValueError("name at least one model, for example: marval bench fashion-teacher fashion-student")
    if repeats < 0 or samples < 0 or any(batch < 1 for batch in batches):
        raise ValueError(
            f"--repeats {repeats}, --samples {samples}, --batches {batches}: expected repeats and samples from 0 and "
            "batches from 1"
        )
    if plot is not None:
        need_matplotlib()  # before hours of measuring
    device = usable_device(device)
    sizes = [name.removeprefix("imagenet256-") for name in models]
    full_size = [size for name, size in zip(models, sizes, strict=True) if size != name and size in get_args(Size)]
    if full_size and (len(full_size) < len(models) or samples or guidance or len(steps) > 1):
        raise ValueError("imagenet256-* have random weights: bench them alone, without --samples and --guidance")
    loaded = [] if full_size else load_models(models, device, steps, guidance)
    pipelines = [pipeline for _, pipeline in loaded]
    for size in full_size:
        pair = random_pair(cast(Size, size), device)
        pipelines += [p.with_chain(steps=next(iter(steps), None)) if p.config.draw.kind == "chain" else p for p in pair]
    iterations = iterations or (pipelines[0].config.iterations,)
    if not batches and full_size:
        batches = (1, 4) if device == "cpu" else (1, largest_batch(pipelines[0], iterations[0], autocast))
    batches = batches or worthwhile_batches(pipelines, iterations[0], autocast)
    if samples:
        judged = judge_for(pipelines[0], None, None)
        measure(loaded, judged, iterations=iterations, samples=samples, out=out, seeds=seed, autocast=autocast)
    rows = run(
        pipelines, iterations=iterations, batches=batches, repeats=repeats, out=out, autocast=autocast,
        compiled=compiled,
    )  # fmt: skip
    if loaded:
        complete(rows, loaded, out, memory=not compiled)
        print(summary(rows))
        show_curve(out, min(batches), plot)


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
    browser: bool = False,
    device: str = "auto",
) -> None:
    """Open a web page that draws, edits and compares pictures; it works offline, and only this machine reaches it.

    marval serve

    marval serve runs/mine runs/student --port 8000 --browser

    Args:
        models: bundled models' names, or models' or runs' folders; the bundled models when left out.
        host: the address to listen on; 0.0.0.0 lets other machines in.
        port: the port to listen on.
        browser: open the page in a browser.
        device: "auto", "cpu", "cuda", "mps", ...
    """
    try:
        from marval.page.app import serve as run
    except ImportError as error:
        raise ValueError(f"the page needs gradio ({error}): pip install 'marval[serve]'") from None
    from marval.page.studio import Studio

    names = models or ("fashion-teacher", "fashion-student", "fashion-tuned")
    page, address = run(Studio.open(names, usable_device(device)), host, port, browser)
    print(f"marval is on {address}  (Ctrl-C ends it)", flush=True)
    page.block_thread()
