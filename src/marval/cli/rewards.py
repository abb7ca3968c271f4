"""The verbs about rewards: rewards, train-text-image and study."""

from pathlib import Path
from typing import Literal

from tyro.conf import OmitArgPrefixes, Positional

from marval.cli.arguments import anchor_for, judge_for, load_pipeline, usable_device
from marval.config import Count, DistillConfig, FinetuneConfig, check


def rewards() -> None:
    """List the rewards that have names, where their weights come from and under which licences.

    marval rewards

    marval finetune fashion-student --reward classifier=1,my_rewards.py:brightness=0.5 --out runs/tuned
    """
    from marval.rewards import KNOWN

    for name, about in KNOWN.items():
        print(f"{name}: {about.what}\n    weights {about.source}; {about.licence}")
    print("file.py:function: your own, or module:function where the file is in the current folder")
    print("    called with images in [0, 1] and prompts; returns one number per image, differentiable")
    print("    prompt.class_name is the class that a prompt asks for")
    print("\nWeights come from the hub or its cache. From elsewhere: NAME:FOLDER or NAME:HUB-ID. With factors:")
    print("    --reward pickscore=1,clip:openai/clip-vit-base-patch32=0.5,my_rewards.py:brightness=0.1")


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
    from marval.io.files import check_output, write_text
    from marval.provenance import provenance
    from marval.train.text_image import Phrases
    from marval.train.text_image import train_text_image as run

    for file in (out, report):
        check_output(file, folder=False)
    check("--images", images, Count)
    check("--steps", steps, Count)
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


def study(
    kind: Positional[Literal["rl"]],
    student: Positional[str] = "fashion-student",
    *,
    teacher: str = "fashion-teacher",
    reward: str = "classifier",
    classifier: Path | None = None,
    held_out: str = "text-image",
    data: str | None = None,
    judge: Path | None = None,
    only: str = "",
    samples: int = 1000,
    settings: OmitArgPrefixes[FinetuneConfig] = FinetuneConfig(iterations=200, probe_every=20),
    runs: Path = Path("runs/study-rl"),
    out: Path = Path("results/study-rl.json"),
    docs: Path = Path("docs"),
    device: str = "auto",
) -> None:
    """Tune a student in a grid of ways and show what each does to reward, held-out rewards, distance and diversity.

    marval study rl

    marval study rl runs/student --teacher runs/mine --judge judge.safetensors --only "plain,head,anchor: teacher"

    Args:
        kind: "rl": the settings of reward tuning.
        student: the one-step student that every run starts from.
        teacher: its teacher, for the anchors.
        reward: what is optimised, as finetune takes it.
        classifier: the classifier of that reward; the bundled one for Fashion-MNIST when left out.
        held_out: rewards that are only watched, with commas; "" for none.
        data: the training images; those of the student when left out.
        judge: the held-out classifier; the bundled one for Fashion-MNIST when left out.
        only: names of runs, with commas; all of the grid when left out.
        samples: images of every measurement.
        runs: a folder for the runs.
        out: the JSON file; runs that it holds already are not repeated.
        docs: a folder for page, plot and pictures.
        device: "auto", "cpu", "cuda", "mps", ...
    """
    from marval.io.checkpoint import model_hash
    from marval.pipeline import find_model
    from marval.rewards import WeightedReward, find_reward, parse_rewards
    from marval.study import rl_grid, study_rl, write_page

    device = usable_device(device)
    pipeline = load_pipeline(student, device)
    anchor = anchor_for(pipeline, teacher, data, DistillConfig(), settings)
    grid = rl_grid(settings)
    names = [name.strip() for name in only.split(",") if name.strip()] or [run.name for run in grid]
    if unknown := set(names) - {run.name for run in grid}:
        raise ValueError(f"--only {', '.join(sorted(unknown))}: expected some of {', '.join(run.name for run in grid)}")
    judged = judge_for(pipeline, data, judge)
    if judged.classifier is None:
        raise ValueError(
            "a study needs a held-out classifier: make one with marval train-classifier, then --judge FILE"
        )
    study_rl(
        pipeline,
        model_hash(find_model(student)),
        WeightedReward(parse_rewards(reward, classifier, device)),
        reward,
        {name.strip(): find_reward(name.strip(), device=device) for name in held_out.split(",") if name.strip()},
        judged,
        settings,
        [run for run in grid if run.name in names],
        anchor,
        runs,
        out,
        samples=samples,
    )
    write_page(out, docs, runs)
    print(f"{docs / 'study-rl.md'}, {docs / 'study-rl.png'} and {out}")
