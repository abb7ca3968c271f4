"""What a student draws in a training update, in which contexts its score is matched, and its energy score."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from marval.losses.energy import energy_score
from marval.model import MAR
from marval.model.cached import Groups
from marval.sampling import DrawTokens
from marval.sampling.draw import Draw, Guidance
from marval.train.draws import GSIMDraws


class Inputs(NamedTuple):
    """What a context network sees."""

    tokens: Tensor  # (b, l, c)
    visible: Tensor  # (b, v)
    positions: Tensor  # (b, q), whose contexts are asked for
    given: Tensor  # labels (b,) or vectors of prompts (b, f)
    groups: Groups | None = None  # what is drawn together, of a network with a cache


def target_contexts(
    model: MAR, inputs: Inputs, *, guided: bool, autocast: bool, noise: Float[Tensor, "b q c"] | None = None
) -> Float[Tensor, "g n d"]:
    """The contexts `c` of the positions in float32: conditional and, when `guided`, null.

    Args:
        noise: what their tokens start from, of a network that draws them jointly.
    """
    tokens, visible, positions, given, groups = inputs
    conditions = [model.embed(given), *([model.null_condition(len(given))] if guided else [])]
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=autocast):
        contexts, _ = model.advance(model.start(*conditions), tokens, visible, positions, groups, noise)
    return contexts.float()


def student_contexts(
    student: MAR, draw: DrawTokens, inputs: Inputs, z: Float[Tensor, "n c"], autocast: bool
) -> Float[Tensor, "1 n d"]:
    """`c_theta` of tokens that are drawn together from the noise z, in one AR iteration."""
    noise = draw.joint_noise(z.unflatten(0, inputs.positions.shape)[None]) if student.config.joint_draw else None
    return target_contexts(student, inputs, guided=False, autocast=autocast, noise=noise)


def of_images(x: Float[Tensor, "*s n d"], images: int, some: slice) -> Float[Tensor, "*s m d"]:
    """Some rows of every image, of rows that are flattened over images."""
    return x.unflatten(-2, (images, -1))[..., some, :].flatten(-3, -2)


def guidance_of(w: Guidance, images: int, count: int) -> float | Float[Tensor, " k"]:
    """W of `count` tokens of every image, whose targets have it."""
    return w.unflatten(0, (images, -1))[:, :1].expand(-1, count).flatten() if isinstance(w, Tensor) else w


def student_tokens(
    student: MAR, draw: DrawTokens, inputs: Inputs, w: Guidance, part: GSIMDraws, autocast: bool
) -> tuple[Float[Tensor, "n c"], Float[Tensor, "1 n d"], Inputs]:
    """`x_0 = g_theta(z, c_theta, w)` of the targets, in one AR iteration; `c_theta`; where their score is matched.

    That is what `inputs` show and, of a joint draw, some of its other tokens (docs/method.md, "Tokens that agree").
    Those are detached: at one token that is left, its score given the others is the joint draw's own.
    """
    (images, targets), revealed = inputs.positions.shape, part.revealed
    contexts = student_contexts(student, draw, inputs._replace(positions=part.together), part.z, autocast)
    c_theta, z = (of_images(x, images, slice(targets)) for x in (contexts, part.z))
    x_0 = draw(student.head, c_theta, w, z[None])
    if not revealed:
        return x_0, c_theta, inputs
    with torch.no_grad():
        others, z = (of_images(x, images, slice(-revealed, None)) for x in (contexts, part.z))
        shown = draw(student.head, others, guidance_of(w, images, revealed), z[None]).unflatten(0, (images, revealed))
    places = part.together[:, -revealed:]
    tokens = inputs.tokens.scatter(1, places[..., None].expand_as(shown), shown.to(inputs.tokens.dtype))
    return x_0, c_theta, inputs._replace(tokens=tokens, visible=torch.cat([inputs.visible, places], 1), groups=None)


def energy_samples(
    student: MAR, draw: DrawTokens, inputs: Inputs, w: Guidance, part: GSIMDraws,
    drawn: tuple[Float[Tensor, "n c"], Float[Tensor, "1 n d"]], autocast: bool,
) -> Float[Tensor, "m k c"]:  # fmt: skip
    """The student's samples of the first targets of each image, by `part.energy.student`.

    In a joint draw a token depends on the noise of others, so each sample takes a context of its own; what GSIM drew
    is the first one.

    Args:
        drawn: the targets as GSIM drew them, and their contexts.
    """
    assert part.energy is not None
    (x_0, c_theta), images, noise = drawn, len(inputs.tokens), part.energy.student
    first, samples = slice(part.energy.teacher.shape[1] // images), len(noise)
    own = guidance_of(w, images, first.stop)
    repeated = own.repeat(samples) if isinstance(own, Tensor) else own
    if not student.config.joint_draw:
        contexts, z = of_images(c_theta, images, first).repeat(1, samples, 1), noise.flatten(0, 1)
        return draw(student.head, contexts, repeated, z[None]).unflatten(0, (samples, -1))
    seen = inputs.tokens, inputs.visible, part.together, inputs.given
    tokens, visible, together, given = (torch.cat([x] * samples) for x in seen)
    again = Inputs(tokens, visible, together, given, inputs.groups)
    contexts = student_contexts(student, draw, again, noise.flatten(0, 1), autocast)
    contexts, z = (of_images(x, samples * images, first) for x in (contexts, noise.flatten(0, 1)))
    others = draw(student.head, contexts, repeated, z[None]).unflatten(0, (samples, -1))
    return torch.cat([of_images(x_0, images, first)[None], others])


def energy_scores(
    chain: Draw, contexts: Float[Tensor, "g n d"], w: Guidance, part: GSIMDraws, samples: Float[Tensor, "m k c"]
) -> Float[Tensor, " k"]:
    """The energy score of the student's samples for one of the teacher's chain, at the first targets of each image.

    Args:
        contexts: the teacher's, of all targets.
    """
    assert part.energy is not None
    images, noise = len(part.targets), part.energy.teacher
    count = noise.shape[1] // images
    with torch.no_grad():
        y = chain(of_images(contexts, images, slice(count)), guidance_of(w, images, count), noise)
    return energy_score(samples, y)
