"""How many operations an update takes, from which a run's log has TFLOP/s.

A formula: torch's counter hooks into every module, and would change the last bits of the gradients that it watches.
"""

from statistics import mean

from marval.model import MAR
from marval.presets import DistillConfig, TrainConfig
from marval.runtime.rng import generator
from marval.train.draws import masked_count

FROZEN_BACKWARD = 0.4  # of a pass of the head: to x_t alone, past the modulations, three fifths of a block's weights


def image_flops(
    model: MAR, settings: TrainConfig | DistillConfig, contexts: int, heads: float, cached: bool = False
) -> float:
    """Operations for an image in an update: 2 per multiply-add of matrix products and attention, recomputation apart.

    Args:
        contexts: passes of the context network: 1 forward, 2 more for a backward pass to inputs and weights.
        heads: passes of the head for each of an image's targets, likewise.
        cached: whether the decoder leaves out hidden tokens that are no targets.
    """
    config, rng = model.config, generator("flops")
    share = settings.mask_ratio_min, settings.mask_ratio_std
    masked = mean(masked_count(config.num_tokens, *share, rng) for _ in range(100))
    weights = [
        sum(p.numel() for p in part.parameters()) for part in (model.head, model.encoder_blocks, model.decoder_blocks)
    ]
    targets, places = min(masked, settings.tokens_per_image), config.buffer_size + config.num_tokens
    flops = heads * 2 * weights[0] * targets
    encoder = weights[1], config.encoder_depth * config.encoder_dim, places - masked
    decoded = places - masked + targets if cached else places
    for weights_of_blocks, width, length in (encoder, (weights[2], config.decoder_depth * config.decoder_dim, decoded)):
        flops += contexts * (2 * weights_of_blocks * length + 4 * width * length**2)
    return flops


def teacher_flops(model: MAR, settings: TrainConfig) -> float:
    """Operations for an image in an update of a teacher."""
    return image_flops(model, settings, 3, 3.0)


def gsim_flops(model: MAR, settings: DistillConfig) -> float:
    """Operations for an image in an update of GSIM: the student, the teacher under one or two conditions, and phi."""
    conditions = 1 if settings.guidance == 1.0 and settings.guidance_range is None else 2
    frozen = (conditions + 1) * (1 + FROZEN_BACKWARD)
    share = settings.energy_tokens / settings.tokens_per_image if settings.energy else 0.0
    drawn = share * (conditions * settings.energy_steps + 3 * settings.energy_samples)
    student = image_flops(model, settings, 3, 3.0, settings.cached)
    return student + image_flops(model, settings, conditions, frozen + 3 * settings.auxiliary_steps + drawn)
