"""The random draws of a training update.

Every process makes them for the whole batch, on its own device, and takes its rows of them: N processes do what one
does. They depend on the seed and the update alone, so a resumed run repeats them.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from marval.classes import seen_labels
from marval.config import MARConfig, ModelConfig
from marval.model.cached import Groups
from marval.model.diffusion import NUM_TIMESTEPS
from marval.presets import DistillConfig, TrainConfig, TuneConfig
from marval.runtime.rng import generator
from marval.sampling import draw_counts

ALL_LEVELS = (0, NUM_TIMESTEPS - 1)
THETA_LEVELS = (20, 980)


def masked_count(num_tokens: int, ratio_min: float, ratio_std: float, rng: torch.Generator) -> int:
    """Draw how many tokens to mask: the ratio is a normal around 1, cut to [ratio_min, 1] (MAR: 0.7 and std 0.25)."""
    low, high = torch.special.ndtr(torch.tensor([(ratio_min - 1) / ratio_std, 0.0], dtype=torch.float64))
    u = low + (high - low) * torch.rand((), generator=rng, dtype=torch.float64)
    ratio = 1 + ratio_std * torch.special.ndtri(u).clamp(max=0.0)
    return min(num_tokens, max(1, int(torch.ceil(num_tokens * ratio))))


def masks(
    settings: TrainConfig | DistillConfig, num_tokens: int, update: int, rng: torch.Generator
) -> tuple[Int[Tensor, "b v"], Int[Tensor, "b q"]]:
    """Draw every image's visible positions, and the hidden ones that enter the loss.

    One ratio for the batch. It decides the shapes of tensors, so the host must know it: it has a CPU stream of its own.
    """
    host = generator(settings.seed, "mask ratio", update)
    hidden = masked_count(num_tokens, settings.mask_ratio_min, settings.mask_ratio_std, host)
    order = torch.rand(settings.batch_size, num_tokens, generator=rng, device=rng.device).argsort(dim=1)
    visible = num_tokens - hidden
    return order[:, :visible], order[:, visible : visible + settings.tokens_per_image]


class NoiseLevels(NamedTuple):
    """The level `t` of every target and the noise `eps` that is added to it."""

    t: Tensor  # (b, q), or (n,) of a part
    eps: Tensor  # (b, q, c), or (n, c) of a part

    def part(self, rows: slice) -> "NoiseLevels":
        """Return those of some images, flattened over images and targets."""
        return NoiseLevels(self.t[rows].flatten(), self.eps[rows].flatten(0, 1))


def noise_levels(shape: tuple[int, ...], levels: tuple[int, int], rng: torch.Generator) -> NoiseLevels:
    """Draw a level, uniform between two, and noise for every target; `shape` is (images, targets, channels)."""
    t = torch.randint(levels[0], levels[1] + 1, shape[:2], generator=rng, device=rng.device)
    return NoiseLevels(t, torch.randn(shape, generator=rng, device=rng.device))


class TeacherDraws(NamedTuple):
    """The draws of an update of teacher training."""

    visible: Int[Tensor, "b v"]
    targets: Int[Tensor, "b q"]
    drop: Float[Tensor, " b"]  # 1 where the class is dropped
    levels: NoiseLevels

    def part(self, rows: slice) -> "TeacherDraws":
        """Those of some images."""
        return TeacherDraws(self.visible[rows], self.targets[rows], self.drop[rows], self.levels.part(rows))


def teacher_draws(
    settings: TrainConfig, mar: MARConfig, update: int, device: torch.device | str = "cpu"
) -> TeacherDraws:
    """Draw masks, dropped classes and noise for a batch."""
    rng = generator(settings.seed, "noise", update, device=device)
    visible, targets = masks(settings, mar.num_tokens, update, rng)
    drop = torch.rand(settings.batch_size, generator=rng, device=rng.device) < settings.label_drop
    return TeacherDraws(visible, targets, drop.float(), noise_levels((*targets.shape, mar.token_dim), ALL_LEVELS, rng))


def drawn_guidance(mar: MARConfig, images: int, rng: torch.Generator) -> Float[Tensor, " b"] | None:
    """Draw w of every image, log-uniform, for a student that takes it: small changes of a small w show most."""
    if mar.guidance_range is None:
        return None
    low, high = mar.guidance_range
    return low * (high / low) ** torch.rand(images, generator=rng, device=rng.device)


class EnergyDraws(NamedTuple):
    """The noise of the energy score's samples, for the first targets of each image."""

    teacher: Tensor  # (T, b, e, c), or (T, n, c) of a part
    student: Tensor  # (m, b, e, c), or (m, n, c) of a part

    def part(self, rows: slice) -> "EnergyDraws":
        """Those of some images."""
        return EnergyDraws(*(noise[:, rows].flatten(1, 2) for noise in self))


def drawn_groups(settings: DistillConfig, mar: MARConfig, update: int, visible: int, targets: int) -> Groups | None:
    """Draw how a sampler would have come to so many visible tokens, for a student that reads groups in turn.

    Half of the updates have known tokens (inpainting), which come first; K is log-uniform. The host must know them.
    """
    if not mar.cached:
        return None
    host = generator(settings.seed, "groups", update)
    inpainted, part, exponent = torch.rand(3, generator=host, dtype=torch.float64).tolist()
    known = int(part * (visible + 1)) if inpainted < 0.5 else 0
    sizes, shown, count = [known], known, 0
    for count in draw_counts(mar.num_tokens - known, int((mar.num_tokens - known + 1) ** exponent)):
        if shown + count > visible:
            break
        sizes.append(count)
        shown += count
    together = shown + count - visible  # what is left of the next group, of which the visible tokens may hold some
    return Groups([*sizes, visible - shown], [min(together, targets - i) for i in range(0, targets, together)])


class GSIMDraws(NamedTuple):
    """The draws of an update of GSIM."""

    visible: Int[Tensor, "b v"]
    targets: Int[Tensor, "b q"]
    z: Tensor  # the student's noise: (b, q, c), or (n, c) of a part
    theta: NoiseLevels
    phi: list[NoiseLevels]  # of each of its steps
    guidance: Tensor | None  # w of every image (b,), or of every target (n,) of a part; None: the same for all
    energy: EnergyDraws | None
    groups: Groups | None  # of visible tokens and of targets; None: the student does not ask

    def part(self, rows: slice) -> "GSIMDraws":
        """Those of some images."""
        z, theta, phi = self.z[rows].flatten(0, 1), self.theta.part(rows), [levels.part(rows) for levels in self.phi]
        w = None if self.guidance is None else self.guidance[rows].repeat_interleave(self.targets.shape[1])
        energy = None if self.energy is None else self.energy.part(rows)
        return GSIMDraws(self.visible[rows], self.targets[rows], z, theta, phi, w, energy, self.groups)


def gsim_draws(settings: DistillConfig, mar: MARConfig, update: int, device: torch.device | str = "cpu") -> GSIMDraws:
    """Draw masks, the student's noise, levels for theta's step and phi's, and w where it is drawn, for a batch."""
    rng = generator(settings.seed, "distill", update, device=device)
    visible, targets = masks(settings, mar.num_tokens, update, rng)
    shape = (*targets.shape, mar.token_dim)
    z = torch.randn(shape, generator=rng, device=device)
    theta = noise_levels(shape, THETA_LEVELS, rng)
    phi = [noise_levels(shape, ALL_LEVELS, rng) for _ in range(settings.auxiliary_steps)]
    w, energy = drawn_guidance(mar, settings.batch_size, rng), None
    if settings.energy:
        tokens = len(targets), min(settings.energy_tokens, targets.shape[1]), mar.token_dim
        counts = settings.energy_steps, settings.energy_samples
        energy = EnergyDraws(*(torch.randn(count, *tokens, generator=rng, device=device) for count in counts))
    groups = drawn_groups(settings, mar, update, visible.shape[1], targets.shape[1])
    return GSIMDraws(visible, targets, z, theta, phi, w, energy, groups)


def tune_draws(
    settings: TuneConfig, config: ModelConfig, update: int, device: torch.device | str = "cpu", distances: bool = False,
    batch: int = 0,
) -> tuple[Int[Tensor, " b"], list[int], Float[Tensor, "1 b l c"], Float[Tensor, " b"] | None]:  # fmt: skip
    """Draw a batch's labels and seeds (of orders), which the host must know, the student's noise, and each image's w.

    Args:
        distances: for moments. All labels follow each other, from batch to batch: chance in their shares would be in
            moments, too. And w is the student's own (None): not every w is to draw the real images' distribution.
        batch: counts the batches of an update, from 0 to `settings.moments_batches`.
    """
    names = (update, batch) if batch else (update,)
    host, mar, seen = generator(settings.seed, "tune", *names), config.mar, torch.tensor(seen_labels(config))
    labels = seen[torch.randint(len(seen), (settings.batch_size,), generator=host)]
    if distances:
        before = (update * (1 + settings.moments_batches) + batch) * settings.batch_size
        labels = seen[(before + torch.arange(settings.batch_size)) % len(seen)]
    seeds = torch.randint(2**62, (settings.batch_size,), generator=host).tolist()
    rng = generator(settings.seed, "tune noise", *names, device=device)
    shape = (1, settings.batch_size, mar.num_tokens, mar.token_dim)
    noise = torch.randn(shape, generator=rng, device=device)
    return labels, seeds, noise, None if distances else drawn_guidance(mar, len(seeds), rng)
