"""The verbs about rewards: rewards and train-text-image."""

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from marval.cli.arguments import usable_device


def rewards() -> None:
    """List the rewards that have names, where their weights come from and under which licences.

    marval rewards

    marval finetune fashion-student --reward classifier=1,my_rewards:brightness=0.5 --out runs/tuned
    """
    from marval.rewards import KNOWN

    for name, about in KNOWN.items():
        print(f"{name}: {about.what}\n    weights {about.source}; {about.licence}")
    print("module:function: your own, called with images in [0, 1] and prompts; one number per image, differentiable")
    print("\nWeights come from the hub or its cache. From elsewhere: NAME:FOLDER or NAME:HUB-ID. With factors:")
    print("    --reward pickscore=1,clip:openai/clip-vit-base-patch32=0.5,my_rewards:brightness=0.1")


def train_text_image(
    preset: Positional[Literal["fashion-mnist"]] = "fashion-mnist",
    *,
    data: str | None = None,
    phrases: Path | None = None,
    images: int = 8000,
    steps: int = 2000,
    seed: int = 0,
    out: Path = Path("runs/text-image.safetensors"),
    report: Path = Path("results/text-image.json"),
    device: str = "auto",
) -> None:
    """Train the head of the text-image reward; report its retrieval accuracy with phrases that it never saw.

    marval train-text-image fashion-mnist --out runs/text-image.safetensors

    marval train-text-image --data folder:my-images --phrases my-phrases.json --out runs/mine.safetensors

    Args:
        preset: the data set.
        data: "fashion-mnist", "fashion-mnist:FOLDER", or "folder:DIR".
        phrases: {"class": {"learned": [...], "held_out": [...]}}; the bundled ones for Fashion-MNIST when left out.
        images: training images that are used.
        steps: updates.
        seed: of images, weights and phrases.
        out: the head's file, for --reward text-image:FILE.
        report: the JSON file of the figures.
        device: "auto", "cpu", "cuda", "mps", ...
    """
    import json

    from marval.data import load_images, split_data
    from marval.evaluate.evaluate import provenance
    from marval.io.files import write_text
    from marval.train.text_image import Phrases
    from marval.train.text_image import train_text_image as run

    pictures = load_images(data or preset)
    said = Phrases.read(phrases, pictures.class_names)
    if (data or preset).startswith("fashion-mnist"):
        test = load_images(data or preset, split="test")
    else:
        pictures, test = split_data(pictures, seed)
    figures = run(pictures, test, said, out, images=images, steps=steps, seed=seed, device=usable_device(device))
    write_text(report, json.dumps({**provenance(seed), **figures, "held_out_phrases": said.held_out}, indent=1) + "\n")
    found = figures["held_out"]
    print(
        f"{out}: with {found['phrases']} held-out phrases, {found['image_to_text']:.3f} of {len(test)} images find "
        f"their class's among one of each class; {found['text_to_image']:.3f} of the images that a phrase finds first "
        f"are of its class ({report})"
    )
