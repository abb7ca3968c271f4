"""Every recorded number of the official MAR code, to 3e-6 relative."""

import torch

from marval.config import Chain
from marval.losses.denoising import denoising_loss
from marval.model import NoiseSchedule
from marval.sampling import DrawByChain, draw_counts, guidance_at, prepare, run

TOLERANCE = 5e-6  # of rounding, which differs between processors: 2.6e-6 and 3.4e-6 were seen


def relative_error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def tokens_of(latents):
    return latents.flatten(2).transpose(1, 2)


def visible_of(reference):
    return torch.stack([(row == 0).nonzero()[:, 0] for row in reference["mask"]])


def all_positions():
    return torch.arange(16).expand(2, -1)


def test_encoder(reference, reference_model):
    condition = reference_model.embed(reference["labels"])
    found = reference_model.encode(tokens_of(reference["latents"]), visible_of(reference), condition)
    assert relative_error(found, reference["encoder_out"]) < TOLERANCE


def test_context_and_null_context(reference, reference_model):
    model, tokens, visible = reference_model, tokens_of(reference["latents"]), visible_of(reference)
    for key, condition in (
        ("z", model.embed(reference["labels"])),
        ("z_uncond", model.null_condition(2)),
    ):
        found = model.context(tokens, visible, all_positions(), condition)
        assert relative_error(found, reference[key]) < TOLERANCE


def test_context_at_some_positions_equals_those_rows(reference, reference_model):
    positions = torch.tensor([[3, 11, 0], [15, 2, 7]])
    condition = reference_model.embed(reference["labels"])
    found = reference_model.context(tokens_of(reference["latents"]), visible_of(reference), positions, condition)
    expected = torch.stack([reference["z"][i, row] for i, row in enumerate(positions)])
    assert relative_error(found, expected) < TOLERANCE


def test_head(reference, reference_model):
    context = reference["z"].flatten(0, 1)
    found = reference_model.head(reference["head.x_t"], reference["head.t"].float(), context)
    assert relative_error(found, reference["head.out"]) < TOLERANCE


def test_training_loss(reference, reference_model):
    loss = denoising_loss(
        reference_model.head,
        NoiseSchedule.full(),
        tokens_of(reference["latents"]).flatten(0, 1),
        reference["z"].flatten(0, 1),
        reference["head.t"],
        reference["head.noise"],
    )
    mask = reference["mask"].flatten()
    assert relative_error((loss * mask).sum() / mask.sum(), reference["train_loss"][0]) < TOLERANCE


def test_guided_chain_with_recorded_noise(reference, reference_model):
    draw = DrawByChain(Chain(guidance=3.0, diffusion_steps=10))
    contexts = torch.stack([reference["z"].flatten(0, 1), reference["z_uncond"].flatten(0, 1)])
    found = draw(reference_model.head, contexts, 3.0, reference["chain.noise"][:-1])
    assert relative_error(found, reference["chain.tokens"]) < TOLERANCE


def test_whole_run_masks_guidance_and_latents(reference, reference_model):
    draw = DrawByChain(Chain(guidance=3.0, guidance_schedule="linear", diffusion_steps=10))
    orders = reference["ar.orders"].flip(1)  # the official order names the last-drawn position first
    shown = 0
    noise = torch.zeros(10, 2, 16, 16)
    for k, count in enumerate(draw_counts(16, 5)):
        positions = orders[:, shown : shown + count].sort(dim=1).values
        mask = torch.ones(2, 16).scatter(1, orders[:, :shown], 0.0)
        assert torch.equal(mask, reference["ar.masks"][k])
        shown += count
        revealed = min(shown, 15) / 16
        expected = reference["ar.cfg_per_iteration"][k].item()
        assert abs(guidance_at(3.0, "linear", revealed) - expected) < TOLERANCE
        recorded = reference[f"ar.noise.{k}"][:-1].unflatten(1, (2, count))
        noise.scatter_(2, positions[None, :, :, None].expand(10, -1, -1, 16), recorded)
    start = prepare(reference_model, draw, iterations=5, seeds=[0, 1], orders=orders, noise=noise)
    expected = tokens_of(reference["ar.latents"])
    condition = reference_model.embed(reference["labels"])
    for inference in (False, True):  # torch's own products, and oneDNN's
        with torch.inference_mode(inference):
            *_, (tokens, _) = run(reference_model, draw, condition, start)
        assert relative_error(tokens, expected) < TOLERANCE
