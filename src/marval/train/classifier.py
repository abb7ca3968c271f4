"""Training the small classifiers: the reward's and, by another recipe, the held-out judge."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from marval.data import ImageData, batch_indices
from marval.io.files import check_output
from marval.rewards.classifier import Architecture, Classifier, save_classifier
from marval.runtime.distributed import Workers
from marval.runtime.log import Log
from marval.runtime.rng import generator


def shift(images: Float[Tensor, "b c h w"], rng: torch.Generator, most: int = 1) -> Float[Tensor, "b c h w"]:
    """Move the batch by up to `most` pixels in each direction (one draw for all of it)."""
    height, width = images.shape[-2:]
    dy, dx = (int(x) for x in torch.randint(0, 2 * most + 1, (2,), generator=rng))
    return F.pad(images, (most,) * 4)[..., dy : dy + height, dx : dx + width]


def plan_steps(images: int, epochs: int) -> tuple[int, int]:
    """Choose batch size and number of steps: at least 16 steps an epoch where there are enough images."""
    batch = min(images, 128, max(8, images // 16))
    return batch, epochs * (images // batch)


def check_classes(data: ImageData) -> None:
    """Refuse images of one class only."""
    if len(data.class_names) < 2:
        raise ValueError(f"all images are of one class, {data.class_names[0]!r}: a classifier needs at least two")


def descend(optimizer: torch.optim.Optimizer, steps: int) -> Iterator[int]:
    """Number the steps of a loop whose body leaves gradients: each step follows them, its rate falling as a cosine."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        yield step
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def train_classifier(
    architecture: Architecture,
    data: ImageData,
    test: ImageData,
    out: Path,
    *,
    epochs: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> float:
    """Train a classifier, write it to `out` and return its accuracy on `test`.

    `plain`: SGD with momentum, images as they are. `residual`: AdamW, label smoothing and shifted images.

    Raises:
        ValueError: fewer than two classes, or `out` cannot be written.
    """
    check_output(out, folder=False)
    check_classes(data)
    batch_size, steps = plan_steps(len(data), epochs)
    out.parent.mkdir(parents=True, exist_ok=True)
    residual = architecture == "residual"
    with torch.random.fork_rng(devices=[]):  # torch's layers draw their weights from the global generator
        torch.manual_seed(generator(seed, architecture).initial_seed())
        classifier = Classifier(architecture, data.images.shape[1], data.class_names).to(device).train()
    if residual:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(classifier.parameters(), 2e-3, weight_decay=0.02)
    else:
        optimizer = torch.optim.SGD(classifier.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    log = Log(out.with_suffix(".jsonl"), Workers(), 0, steps, batch_size)
    for step in descend(optimizer, steps):
        images, labels = data.batch(batch_indices(len(data), batch_size, step, seed))
        images, labels = images.to(device), labels.to(device)
        if residual:
            images = shift(images, generator(seed, "augment", step))
        with torch.autocast(images.device.type, torch.bfloat16):
            logits = classifier(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.05 if residual else 0.0)
        loss.backward()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            log(step + 1, {"loss": loss.detach()})
    classifier.eval()
    accuracy = classifier_accuracy(classifier, test)
    save_classifier(out, classifier, {"test_accuracy": accuracy, "epochs": epochs, "seed": seed, "images": len(data)})
    return accuracy


@torch.inference_mode()
def classifier_accuracy(classifier: Classifier, data: ImageData, batch_size: int = 1000) -> float:
    """Compute the share of `data` that the classifier gets right."""
    device = next(classifier.parameters()).device
    right = 0
    for indices in torch.arange(len(data)).split(batch_size):
        images, labels = data.batch(indices)
        right += int((classifier(images.to(device)).argmax(dim=1).cpu() == labels).sum())
    return right / len(data)
