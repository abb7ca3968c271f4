"""The official sampler's loop, rendered step by step, as the measure of our own."""

import torch

from marval.model import NoiseSchedule
from marval.sampling import draw_counts, drawing_orders, guidance_at, image_noise

RANGE = (-2.0, 2.0)  # x_0 is clipped: without it, 1 / alpha at t = 999 magnifies float32's rounding 20,000 times


@torch.inference_mode()
def straightforward(model, chain, labels, iterations, seeds):
    """The official loop, rendered step by step: every network sees the doubled batch, and nothing is kept."""
    config, device, schedule = model.config, labels.device, NoiseSchedule.respaced(chain.diffusion_steps, labels.device)
    total, channels, batch = config.num_tokens, config.token_dim, len(labels)
    noise = image_noise(seeds, chain.diffusion_steps, total, channels, device)
    orders = drawing_orders("random", config.token_grid, seeds).to(device)
    tokens, shown = torch.zeros(batch, total, channels, device=device), 0
    everywhere = torch.arange(total, device=device).expand(2 * batch, -1)
    for count in draw_counts(total, iterations):
        visible, positions = orders[:, :shown], orders[:, shown : shown + count]
        shown += count
        embedding = torch.cat([model.embed(labels), model.null_condition(batch)])
        z = model.context(torch.cat([tokens, tokens]), torch.cat([visible, visible]), everywhere, embedding)
        index = torch.cat([positions, positions])[..., None]
        z = z.gather(1, index.expand(-1, -1, z.shape[-1])).flatten(0, 1)
        w = guidance_at(chain.guidance, chain.guidance_schedule, min(shown, total - 1) / total)
        local = noise.gather(2, positions[None, ..., None].expand(chain.diffusion_steps, -1, -1, channels)).flatten(
            1, 2
        )
        x = torch.cat([local[0], local[0]])
        for i in reversed(range(chain.diffusion_steps)):
            half = x[: len(x) // 2]
            t = schedule.timesteps[i].float().expand(len(x))
            output = model.head(torch.cat([half, half]), t, z)
            conditional, null = output[:, :channels].chunk(2)
            eps = null + w * (conditional - null)
            x_0 = schedule.x0_from_eps(half, eps, i).clamp(*RANGE)
            mean = schedule.posterior_mean(x_0, half, i)
            scale = (0.5 * schedule.log_posterior_variance[i]).exp() if i else 0.0
            x = mean + scale * local[(chain.diffusion_steps - i) % chain.diffusion_steps]
            x = torch.cat([x, x])
        tokens = tokens.scatter(
            1, positions[..., None].expand(-1, -1, channels), x[: len(x) // 2].unflatten(0, positions.shape)
        )
    return tokens
