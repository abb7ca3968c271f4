"""Floating-point operations of a MAR by formula: 2 per multiply-add of matrix products and attention. No torch."""

from dataclasses import dataclass

from marval.config import Chain, MARConfig, ModelConfig

TIME_FEATURES = 256  # of the head's time embedding


@dataclass(frozen=True)
class Flops:
    """Operations of the context network and of the token head."""

    context: int
    head: int

    @property
    def total(self) -> int:
        """Both."""
        return self.context + self.head


def block_flops(rows: int, places: int, dim: int, mlp_ratio: float) -> int:
    """A transformer block's output at `rows` of `places` positions."""
    hidden = int(dim * mlp_ratio)
    query_and_out, key_and_value = 2 * rows * 2 * dim * dim, 2 * places * 2 * dim * dim
    return query_and_out + key_and_value + 4 * rows * places * dim + 4 * rows * dim * hidden


def context_flops(config: MARConfig, visible: int, drawn: int) -> int:
    """One image's contexts of `drawn` tokens, with `visible` tokens known."""
    width, decoder_width, ratio = config.encoder_dim, config.decoder_dim, config.mlp_ratio
    encoded, places = config.buffer_size + visible, config.buffer_size + config.num_tokens
    encoder = 2 * visible * config.token_dim * width + config.encoder_depth * block_flops(
        encoded, encoded, width, ratio
    )
    whole_blocks = (config.decoder_depth - 1) * block_flops(places, places, decoder_width, ratio)
    last_block = block_flops(drawn, places, decoder_width, ratio)
    return encoder + 2 * encoded * width * decoder_width + whole_blocks + last_block


def head_flops(config: MARConfig, tokens: int, conditions: int = 1) -> int:
    """One call of the head on `tokens` tokens under 1 or, guided, 2 conditions each; without the embeddings.

    What depends on the noisy token alone (its input layer) is computed once for both conditions.
    """
    width, rows = config.head_width, tokens * conditions
    outputs = config.token_dim * (2 if config.learn_variance else 1)
    block = 2 * rows * width * 3 * width + 4 * rows * width * width
    final = 2 * rows * width * 2 * width + 2 * rows * width * outputs
    return 2 * tokens * config.token_dim * width + config.head_depth * block + final


def embedding_flops(config: MARConfig, tokens: int, conditions: int, levels: int) -> int:
    """The head's embeddings of contexts, and of `levels` time steps."""
    width = config.head_width
    time = 2 * levels * (TIME_FEATURES * width + width * width)
    return 2 * tokens * conditions * config.decoder_dim * width + time


def iteration_flops(config: MARConfig, visible: int, drawn: int, steps: int, guided: bool) -> Flops:
    """One AR iteration for one image: `steps` calls of the head (1 for a student)."""
    conditions = 2 if guided else 1
    head = embedding_flops(config, drawn, conditions, steps) + steps * head_flops(config, drawn, conditions)
    return Flops(conditions * context_flops(config, visible, drawn), head)


def image_flops(config: MARConfig, counts: list[int], steps: int, guided: bool) -> Flops:
    """A whole image, whose iterations draw `counts` tokens."""
    parts = [iteration_flops(config, sum(counts[:k]), count, steps, guided) for k, count in enumerate(counts)]
    return Flops(sum(part.context for part in parts), sum(part.head for part in parts))


def model_flops(config: ModelConfig, counts: list[int]) -> Flops:
    """As `image_flops`, for the way in which a model draws its tokens."""
    if isinstance(config.draw, Chain):
        return image_flops(config.mar, counts, config.draw.diffusion_steps, guided=config.draw.guidance != 1.0)
    return image_flops(config.mar, counts, 1, guided=False)
