"""Train a teacher of emoji whose network has sizes of your choice; 5.8 million parameters by default.

python examples/emoji/train_teacher.py latents:cache/emoji-few --patch 2 --out runs/emoji-few

The README beside this file has the commands before this one. Any other data of `marval train` will do. `marval
distill`, `tune`, `sample` and `evaluate` take the model as it is. A run that was stopped goes on with the same command
and --resume; it may then get more or fewer --updates, so that the learning rate falls over the last --decay of them
whenever there has been time enough.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import marval
from marval.checks import Checked
from marval.cli.options import run_script
from marval.cli.training import Run
from marval.config import Count, Decay, ModelConfig, Name, Positive, Weighting, Whole
from marval.data import LatentData, load_data
from marval.presets import ENCODER, PRESETS, TrainConfig
from marval.runtime.provenance import command_line
from marval.train.teacher import latent_teacher_config, teacher_config, train_teacher


@dataclass(frozen=True)
class Sizes(Checked):
    """the network"""

    patch: Count | None = None  # latents, or pixels, along a token's side; when left out 1, or what suits the pixels
    width: Count = 192  # channels of the encoder and of the decoder
    depth: Count = 4  # blocks of each of them
    heads: Count = 3  # of their attention
    head_width: Count = 320  # of the token head
    head_depth: Count = 3  # its blocks
    buffer_size: Whole = 8  # tokens that carry the prompt
    dropout: Decay = 0.1  # in training, as MAR
    init: str | None = None  # a model of these sizes to start from, perhaps of fewer concepts
    name: Name = "emoji-teacher"  # the model's name


@dataclass(frozen=True)
class Training(TrainConfig):
    """how it is trained"""

    updates: Count = 14_000
    batch_size: Count = 64
    tokens_per_image: Count = 64  # masked tokens of an image that enter the loss
    learning_rate: Positive = 8e-4  # AdamW's
    weighting: Weighting = "v"  # of noise levels in the loss
    decay: Whole = 3_000  # updates of linear decay to 0, at the end
    save_every: Count = 250  # updates between two saved states


@dataclass(frozen=True)
class Output(Run):
    """output"""

    out: Path = Path("runs/emoji-teacher")  # the run's folder; the model is left in its sub-folder model


def sized(config: ModelConfig, sizes: Sizes) -> ModelConfig:
    """A model's configuration with tokens and a network of other sizes."""
    space = dataclasses.replace(config.space, patch=sizes.patch or config.space.patch)
    mar = dataclasses.replace(
        config.mar, token_grid=space.token_grid, token_dim=space.token_dim,
        encoder_dim=sizes.width, encoder_depth=sizes.depth, encoder_heads=sizes.heads,
        decoder_dim=sizes.width, decoder_depth=sizes.depth, decoder_heads=sizes.heads, head_width=sizes.head_width,
        head_depth=sizes.head_depth, buffer_size=sizes.buffer_size, dropout=sizes.dropout,
    )  # fmt: skip
    return dataclasses.replace(config, space=space, mar=mar, iterations=min(config.iterations, mar.num_tokens))


def train(data: str, *, sizes: Sizes, settings: Training, output: Output) -> None:
    """Train a teacher of emoji whose network has sizes of your choice.

    Args:
        data: latents:DIR (marval cache), or folder:DIR, images that become tokens of pixels
    """
    device, source = output.check(), command_line()
    images = load_data(data, encoder=ENCODER)
    if isinstance(images, LatentData):
        config = latent_teacher_config(PRESETS[0], sizes.name, images, data, source)
    else:
        config = teacher_config(sizes.name, images, data, source)
    start = marval.load(sizes.init).model if sizes.init is not None else None
    with output.start(device, settings) as run:
        done = train_teacher(sized(config, sizes), settings, images, run, init=start)
        if run.workers.main:
            print(f"{output.out / 'model'}: {done} of {settings.updates} updates done")


if __name__ == "__main__":
    run_script(train)
