"""Distil with other contexts than masked real images: a study of docs/research.md ("GSIM: its contexts").

    python tools/contexts.py --own 0.5 distill fashion-teacher --data fashion-mnist --updates 800 --out runs/own

What stands behind `distill` is the package's own command line.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from marval import cli
from marval.config import MARConfig, ModelConfig
from marval.data.loader import Batches
from marval.model import MAR
from marval.presets import DistillConfig
from marval.runtime.distributed import Workers
from marval.runtime.rng import generator
from marval.sampling import draw_function, sample
from marval.sampling.draw import Guidance
from marval.sampling.orders import drawing_orders
from marval.train import distill
from marval.train.draws import GSIMDraws, gsim_draws

POOL = 512  # of the student's pictures, a batch of them drawn anew at every REFRESH-th update
REFRESH = 8
FIRST = 100  # student updates without its own pictures: they are noise at first

Part = tuple[float, Guidance, distill.Inputs, GSIMDraws]


class OwnPictures:
    """Pictures of the student as it is: they take the place of some real images of each batch."""

    def __init__(self, share: float):
        self.share, self.pool = share, list[tuple[Tensor, Tensor]]()
        self.tokens, self.labels = torch.empty(0), torch.empty(0)
        self.copy_networks, self.masked_parts = distill.copy_networks, distill.masked_parts

    def copied(self, teacher: MAR, config: ModelConfig, settings: DistillConfig, workers: Workers) -> tuple:
        """Do as `copy_networks`, and remember the student's average."""
        networks = self.copy_networks(teacher, config, settings, workers)
        self.student = networks[2]
        return networks

    def parts(
        self, update: int, settings: DistillConfig, student: ModelConfig, loader: Batches, workers: Workers
    ) -> Iterator[Part]:
        """Do as `masked_parts`, with the first images of each part replaced."""
        if update >= settings.warmup + FIRST and (update % REFRESH == 0 or not len(self.tokens)):
            self.draw(student, settings, update)
        for share, w, inputs, part in self.masked_parts(update, settings, student, loader, workers):
            count = int(len(inputs.tokens) * self.share) if len(self.tokens) else 0
            rng = generator(settings.seed, "own pictures of a batch", update)
            if count:
                rows = torch.randint(len(self.tokens), (count,), generator=rng)
                tokens = torch.cat([self.tokens[rows], inputs.tokens[count:]])
                inputs = inputs._replace(tokens=tokens, given=torch.cat([self.labels[rows], inputs.given[count:]]))
            yield share, w, inputs, part

    @torch.no_grad()
    def draw(self, config: ModelConfig, settings: DistillConfig, update: int) -> None:
        """Draw a batch with the student's own K and order."""
        device = self.student.mask_token.device
        labels = torch.arange(settings.batch_size, device=device) % config.mar.num_classes
        condition, seed = self.student.embed(labels), update * settings.batch_size
        draw = draw_function(config, device)
        new = sample(self.student, draw, condition, iterations=config.iterations, orders=config.order, seeds=seed)
        self.pool = [*self.pool, (new, labels)][-POOL // settings.batch_size :]
        self.tokens, self.labels = map(torch.cat, zip(*self.pool, strict=True))


def in_order(settings: DistillConfig, mar: MARConfig, update: int, draws: GSIMDraws) -> GSIMDraws:
    """Let visible tokens and targets be those of the sampler's order, which come first and next."""
    visible, targets = draws.visible.shape[1], draws.targets.shape[1]
    first = update * settings.batch_size
    seeds = range(first, first + len(draws.visible))
    order = drawing_orders(settings.order, mar.token_grid, seeds).to(draws.visible.device)
    return draws._replace(visible=order[:, :visible], targets=order[:, visible : visible + targets])


def prefix_draws(settings: DistillConfig, mar: MARConfig, update: int, device: torch.device | str = "cpu") -> GSIMDraws:
    """Do as `gsim_draws`, `in_order`."""
    return in_order(settings, mar, update, gsim_draws(settings, mar, update, device))


def in_groups(groups: int) -> Callable[..., Iterator[Part]]:
    """Make a `masked_parts` that masks each of some groups of a batch, its loader's parts, as a batch of its own."""
    masked_parts = distill.masked_parts

    def parts(
        update: int, settings: DistillConfig, student: ModelConfig, loader: Batches, workers: Workers
    ) -> Iterator[Part]:
        small = dataclasses.replace(settings, batch_size=settings.batch_size // groups)
        for i, (_, tokens, given) in enumerate(loader(update)):
            number = update * groups + i
            batches = {number: [(slice(0, len(tokens)), tokens, given)]}
            for share, w, inputs, part in masked_parts(number, small, student, batches.__getitem__, workers):
                yield share / groups, w, inputs, part

    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--own", type=float, default=0.0, help="share of images that the student drew itself")
    parser.add_argument("--prefixes", action="store_true", help="visible tokens are the first of the sampler's order")
    parser.add_argument("--groups", type=int, default=1, help="of a batch, each with a mask ratio of its own")
    given, rest = parser.parse_known_args()
    if given.own and (given.prefixes or given.groups > 1):
        parser.error("--own goes with neither --prefixes nor --groups")
    if given.own:
        own = OwnPictures(given.own)
        distill.copy_networks, distill.masked_parts = own.copied, own.parts
    if given.prefixes:
        distill.gsim_draws = prefix_draws
    if given.groups > 1:
        distill.masked_parts = in_groups(given.groups)
        rest += ["--accumulate", str(given.groups)]
    cli.main(rest)


if __name__ == "__main__":
    main()
