"""A loaded model draws images: seeds, batches, inpainting, orders, devices, and what it refuses."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from PIL import Image

from marval.config import OneStep
from marval.pipeline import Pipeline
from marval.runtime.rng import generator
from marval.spaces import Pixels
from small import CHAIN, DRAWS, SPACE, kept_mask, small_pipeline

KINDS = sorted(DRAWS)


def as_bytes(images):
    return (images * 255).round().to(torch.uint8)


def close(found, expected):
    """The same up to rounding, and exactly the same as 8-bit images."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    return torch.equal(as_bytes(found), as_bytes(expected))


# --- seeds and batches ---


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_the_same_alone_and_in_any_batch(kind):
    model, classes, seeds = small_pipeline(kind), [0, 3, 3, 1, 4], [7, 8, 9, 10, 11]
    together = model.sample(classes, seed=seeds)
    for batch_size in (1, 2, 3):
        assert close(model.sample(classes, seed=7, batch_size=batch_size), together)
    shuffle = [3, 0, 4, 2, 1]
    assert close(model.sample([classes[i] for i in shuffle], seed=[seeds[i] for i in shuffle]), together[shuffle])


@pytest.mark.parametrize("kind", KINDS)
def test_images_depend_on_seed_class_order_and_iterations(kind):
    model = small_pipeline(kind)
    base = model.sample([1], seed=0, order="raster")
    assert torch.equal(model.sample([1], seed=0, order="raster"), base)
    for change in ({"seed": 1}, {"classes": [2]}, {"order": "halton"}, {"iterations": 2}):
        assert (model.sample(**{"classes": [1], "seed": 0, "order": "raster", **change}) - base).abs().max() > 0.01


def test_seeds_of_any_integer_type_draw_the_same_pictures():
    student = small_pipeline("one_step")
    expected = student.sample([1, 2], seed=[4, 5])
    for seed in (range(4, 6), torch.tensor([4, 5], dtype=torch.int32), [np.int64(4), torch.tensor(5)], np.int16(4)):
        assert torch.equal(student.sample([1, 2], seed=seed), expected)
        assert torch.equal(student.space.decode(student.sample_tokens([1, 2], seeds=seed)), expected)


def test_seeds_may_be_negative_and_of_any_size():
    assert generator(-5, "order", 3).initial_seed() == 4270118236149423675  # as every picture so far was drawn
    student, pictures = small_pipeline("one_step"), []
    for seed in (-1, 1, -(2**70), 2**63 + 1, 2**70):
        pictures.append(student.sample([1], seed=seed))
        torch.testing.assert_close(student.sample([0, 1], seed=seed - 1)[1:], pictures[-1], rtol=0, atol=1e-4)
    assert len({tuple(picture.flatten().tolist()) for picture in pictures}) == len(pictures)
    for wrong in (True, [0, 1.5], torch.tensor(1.0), "12"):
        with pytest.raises((ValueError, TypeCheckError), match=r"whole number|Type"):
            student.sample([0, 1], seed=wrong)


def test_classes_may_be_names_and_integers_of_any_type():
    student = small_pipeline("one_step")
    expected = student.sample([1, 3])
    for classes in (np.array([1, 3]), [np.uint8(1), "3"], ["b", torch.tensor(3)], "bd"):
        assert torch.equal(student.sample(classes), expected)
    for one in (3, np.int64(3), np.array(3), torch.tensor(3)):
        assert torch.equal(student(one, output_type="pt"), student.sample([3]))
    for classes in ([-1], [5], [True], [1.0], ["-1"], ["²"]):
        with pytest.raises((ValueError, TypeCheckError), match=r"unknown class|Type"):
            student.labels(classes)


@pytest.mark.parametrize("inpainting", [False, True])
def test_no_more_than_a_batch_is_encoded_or_decoded_at_a_time(inpainting):
    student, sizes, classes = small_pipeline("one_step"), [], [0, 1, 2, 3, 4, 0, 1]
    images, keep = torch.rand(7, 1, 6, 8, generator=generator("images")), kept_mask(*[[0, 5, 11]] * 7)
    given = {"images": images, "keep": keep} if inpainting else {}
    expected = student.sample(classes, **given)

    class Space(Pixels):
        def encode(self, images):
            sizes.append(len(images))
            return super().encode(images)

        def decode(self, tokens):
            sizes.append(len(tokens))
            return super().decode(tokens)

    student.space = Space(SPACE)
    assert close(student.sample(classes, batch_size=3, **given), expected)
    assert sizes == ([3, 3, 3, 3, 1, 1] if inpainting else [3, 3, 1])


# --- other ways to call it ---


def test_a_call_returns_pil_images_of_seeds_from_a_generator():
    student = small_pipeline("one_step")
    rng = torch.Generator().manual_seed(3)
    seeds = torch.randint(2**62, (4,), generator=torch.Generator().manual_seed(3)).tolist()
    images = student(["b", 2], num_images=2, generator=rng, iterations=3)
    expected = student.sample([1, 1, 2, 2], seed=seeds, iterations=3)
    assert all(isinstance(image, Image.Image) for image in images)
    assert np.array_equal(np.stack([np.asarray(image) for image in images]), as_bytes(expected)[:, 0].numpy())
    assert torch.equal(student("b", output_type="pt", seed=7), student.sample([1], seed=7))
    for wrong in ({"generator": rng, "seed": 1}, {"num_images": 0}):
        with pytest.raises(ValueError, match=r"a generator and a seed|0 classes"):
            student("b", **wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_move_to_another_precision(kind):
    model, expected = small_pipeline(kind), small_pipeline(kind).sample([1, 2])
    assert model.to("cpu", torch.bfloat16) is model
    assert {p.dtype for p in model.model.parameters()} == {torch.bfloat16}
    images = model.sample([1, 2])
    assert images.dtype == torch.float32
    assert 0 < (images - expected).abs().mean() < 0.1
    assert model.sample_tokens([1], seeds=0).dtype == torch.float32


def test_a_teachers_chain_may_have_other_settings():
    teacher = small_pipeline("chain")
    assert teacher.with_draw() is teacher
    other = teacher.with_draw(guidance=1.0, diffusion_steps=3)
    assert other.config.draw == dataclasses.replace(CHAIN, guidance=1.0, diffusion_steps=3)
    assert (other.sample([1]) - teacher.sample([1])).abs().max() > 0.01
    assert torch.equal(teacher.sample([1], guidance=1.0, diffusion_steps=3), other.sample([1]))
    with pytest.raises(ValueError, match="guidance: not for a one-step student"):
        small_pipeline("one_step").with_draw(guidance=2.0)


def test_guidance_and_temperature_are_dials_of_a_student_that_takes_them():
    student = small_pipeline("dial")
    own = student.sample([1, 2], seed=5)
    assert torch.equal(student.sample([1, 2], seed=5, guidance=1.5, temperature=1.0), own)
    images = {w: student.sample([1, 2], seed=5, guidance=w) for w in (1.0, 3.0)}
    assert (images[3.0] - images[1.0]).abs().max() > 0.01
    grows = student.sample([1, 2], seed=5, guidance=3.0, guidance_schedule="linear")
    assert (grows - images[3.0]).abs().max() > 0.001
    cold = [student.sample([1], seed=seed, temperature=0.0, order="raster") for seed in (1, 2)]
    assert torch.equal(*cold)  # without noise only the order would tell images apart
    with pytest.raises(ValueError, match=r"guidance 3.5: expected a number from 1 to 3"):
        student.sample([1], guidance=3.5)


# --- inpainting ---


@pytest.mark.parametrize("kind", KINDS)
def test_kept_pixels_stay_bit_identical(kind):
    images = torch.randint(0, 256, (2, 1, 6, 8), generator=generator("images")).float() / 255
    keep = kept_mask([0, 5, 11], [1, 2, 3])
    drawn = small_pipeline(kind).sample([0, 1], seed=3, images=images, keep=keep)
    pixels = keep.unflatten(1, (3, 4))[:, None].repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(drawn[pixels], images[pixels])
    assert (drawn[~pixels] != images[~pixels]).float().mean() > 0.9


def test_inpainting_draws_what_is_left_and_no_more():
    student, keep = small_pipeline("one_step"), torch.ones(1, 12, dtype=torch.bool)
    images = torch.rand(1, 1, 6, 8, generator=generator("inpainting"))
    assert torch.equal(student.sample([0], images=images, keep=keep), images)
    keep[0, :2] = False
    drawn = student.sample([0], images=images, keep=keep)  # the default K is 4, two tokens are left
    assert torch.equal(drawn[..., 2:, :], images[..., 2:, :])
    assert not torch.equal(drawn, images)
    two, keep = torch.cat([images, images]), torch.cat([keep, kept_mask([0])])  # in batches of one: each its own K
    both = student.sample([0, 1], images=two, keep=keep, batch_size=1)
    assert close(both[:1], drawn)
    assert close(both[1:], student.sample([1], seed=1, images=images, keep=keep[1:]))


def test_every_iteration_is_shown():
    student, shown = small_pipeline("one_step"), []
    keep, images = kept_mask([0, 5, 11], [1, 2, 3]), torch.rand(2, 1, 6, 8, generator=generator("shown"))
    final = student.sample(
        [0, 1], images=images, keep=keep, iterations=4, on_iteration=lambda *each: shown.append(each)
    )
    assert [k for k, *_ in shown] == [1, 2, 3, 4]
    assert close(torch.where(shown[-1][1] == final, final, shown[-1][1]), final)
    assert all(drawn[keep].all() for *_, drawn in shown)
    assert shown[-1][2].all()


def test_bad_input_is_refused_with_what_was_expected():
    student = small_pipeline("one_step")
    images, keep = torch.zeros(2, 1, 6, 8), kept_mask([0], [1])
    for settings, message in (
        ({"classes": []}, "0 classes"),
        ({"batch_size": 0}, "batches of 0"),
        ({"images": images}, "both"),
        ({"keep": keep}, "both"),
        ({"seed": [1, 2, 3], "batch_size": 1}, "3 seeds for 2 images"),
        ({"order": torch.arange(12).expand(3, -1), "batch_size": 1}, r"shape \(12,\) or \(2, 12\)"),
        ({"images": images[:1].expand(3, -1, -1, -1), "keep": keep[:1].expand(3, -1)}, r"images \(3, 1, 6, 8\) and a"),
        ({"images": images.repeat(1, 3, 1, 1), "keep": keep}, r"expected images \(2, 1, 6, 8\)"),
        ({"images": images.repeat(1, 1, 2, 2), "keep": keep}, r"expected images \(2, 1, 6, 8\)"),
        ({"images": images, "keep": kept_mask([0, 5, 11], [1, 2])}, "same number"),
        ({"images": images / 0, "keep": keep}, "known tokens"),
        ({"iterations": 13}, "13 iterations"),
    ):
        with pytest.raises(ValueError, match=message):
            student.sample(**{"classes": [0, 1], **settings})


def test_orders_of_any_integer_type():
    student, order = small_pipeline("one_step"), torch.arange(12).roll(5)
    expected, small = student.sample([0, 1], order=order), order.to(torch.uint8)
    assert torch.equal(student.sample([0, 1], order=small), expected)
    assert close(student.sample([0, 1], order=small.expand(2, -1), batch_size=1), expected)
    assert torch.equal(student.sample([0, 1], order=lambda grid, seed: small), expected)


# --- values that are not finite ---


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_not_finite_are_refused_with_seed_and_class(kind):
    model = small_pipeline(kind)
    model.model.class_emb.weight[3] = math.nan
    inpainting = {"images": torch.zeros(3, 1, 6, 8), "keep": kept_mask(*[[0, 5, 11]] * 3)}
    assert model.sample([0, 1], seed=7).isfinite().all()
    for draw in (
        lambda: model.sample([0, 1, 3], seed=7),
        lambda: model.sample([0, 1, 3], seed=7, **inpainting),
        lambda: model.sample_tokens([0, 1, 3], seeds=[7, 8, 9]),
    ):
        with pytest.raises(ValueError, match=r"draws values that are not finite \(first: seed 9, class 3\): .*float32"):
            draw()


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_hides_no_infinity_and_a_decoder_none_either(kind):
    model = small_pipeline(kind)
    model.config = dataclasses.replace(model.config, draw=CHAIN if kind == "chain" else OneStep(clip=True))

    class Broken(Pixels):
        def decode(self, tokens):
            return super().decode(tokens) / 0

    with pytest.raises(ValueError, match="not finite"):
        Pipeline(model.model, model.config, Broken(SPACE)).sample([0])
    model.model.head.final_layer.linear.bias[1] = math.inf
    with pytest.raises(ValueError, match="seed 0, class 2"):
        model.sample([2])
