"""The token head: the small AdaLN MLP that denoises one token given its context (MAR, section 3.2)."""

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def timestep_features(t: Float[Tensor, " n"], dim: int = 256) -> Float[Tensor, "n dim"]:
    """Sinusoidal features of the time step: `[cos(t f_j), sin(t f_j)]`, `f_j` falling from 1 to 1e-4."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, device=t.device))
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Sinusoidal features, then a two-layer SiLU network."""

    def __init__(self, width: int, features: int = 256):
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Float[Tensor, " n"]) -> Float[Tensor, "n w"]:
        return self.mlp(timestep_features(t.float(), self.features).to(next(self.mlp.parameters()).dtype))


class ExactLinear(nn.Linear):
    """A linear layer in the precision of its input or of its weights, whichever is higher, whatever autocast says.

    Tokens enter and leave the head through it: at small t the noise to predict is smaller than bf16's rounding of the
    token.
    """

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n o"]:
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class ResBlock(nn.Module):
    """`x + gate * mlp(norm(x) * (1 + scale) + shift)`; `m` has shift, scale and gate, which the condition gives."""

    def __init__(self, width: int):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Float[Tensor, "*h n w"], m: Float[Tensor, "*g n w3"]) -> Float[Tensor, "*g n w"]:
        shift, scale, gate = m.chunk(3, dim=-1)
        normed = self.in_ln(x.to(self.in_ln.weight.dtype))
        return torch.addcmul(x, gate, self.mlp(torch.addcmul(shift, normed, 1 + scale)))


class FinalLayer(nn.Module):
    """Modulated norm and the output projection."""

    def __init__(self, width: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = ExactLinear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Float[Tensor, "*g n w"], m: Float[Tensor, "*g n w2"]) -> Float[Tensor, "*g n o"]:
        shift, scale = m.chunk(2, dim=-1)
        return self.linear(torch.addcmul(shift, self.norm_final(x), 1 + scale))


class TokenHead(nn.Module):
    """Predicts the noise in a token, and with `learn_variance` a variance channel behind it, from its context."""

    def __init__(
        self, token_dim: int, context_dim: int, width: int, depth: int, learn_variance: bool,
        guidance_range: tuple[float, float] | None = None,
    ):  # fmt: skip
        super().__init__()
        self.token_dim = token_dim
        out_channels = 2 * token_dim if learn_variance else token_dim
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(context_dim, width)
        self.input_proj = ExactLinear(token_dim, width)
        self.res_blocks = nn.ModuleList([ResBlock(width) for _ in range(depth)])
        self.final_layer = FinalLayer(width, out_channels)
        self.guidance_range = guidance_range
        self.guidance_embed = None if guidance_range is None else TimeEmbedding(width)

    def initialize(self, generator: torch.Generator) -> None:
        """Xavier weights; zero modulation and output layers, so that the untrained head answers 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        for name, parameter in self.time_embed.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02, generator=generator)
        for block in [*self.res_blocks, self.final_layer]:
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def take_guidance(self, guidance_range: tuple[float, float]) -> "TokenHead":
        """Give a head w as an input, which changes no answer before it is trained; return the head itself.

        Its embedding starts as that of time steps, whose features tell values apart, with an output of zeros.
        """
        self.guidance_range, self.guidance_embed = guidance_range, copy.deepcopy(self.time_embed)
        for parameter in self.guidance_embed.mlp[2].parameters():
            nn.init.zeros_(parameter)
        return self

    def forward(
        self,
        x_t: Float[Tensor, "n c"],
        t: Float[Tensor, " n"],
        context: Float[Tensor, "n d"],
        guidance: float | Float[Tensor, " n"] = 1.0,
    ) -> Float[Tensor, "n o"]:
        """The prediction for noisy tokens `x_t` at the time steps `t` in [0, 999], given their contexts.

        Args:
            guidance: w, of a head that takes it; others do not read it.
        """
        return self.denoise(x_t, self.embed_guidance(self.embed_time(t) + self.embed_context(context), guidance))

    def embed_time(self, t: Float[Tensor, " n"]) -> Float[Tensor, "n w"]:
        """Embed time steps."""
        return self.time_embed(t)

    def embed_context(self, context: Float[Tensor, "*g n d"]) -> Float[Tensor, "*g n w"]:
        """Embed contexts."""
        return self.cond_embed(context)

    def embed_guidance(self, y: Float[Tensor, "n w"], guidance: float | Float[Tensor, " n"]) -> Float[Tensor, "n w"]:
        """Add w, of all tokens or of each, to an embedded condition, where the head takes it.

        Its logarithm runs from 0 to 999 over the head's range, as time steps do.
        """
        if self.guidance_range is None or self.guidance_embed is None:
            return y
        if not isinstance(guidance, Tensor):
            guidance = torch.full((1,), guidance, device=y.device)
        low, high = self.guidance_range
        return y + self.guidance_embed(999 * (guidance / low).log() / math.log(high / low))

    def modulate(self, y: Float[Tensor, "*s n w"]) -> list[Float[Tensor, "*s n _"]]:
        """Every block's shift, scale and gate, and the final layer's shift and scale, for embedded conditions `y`.

        They do not depend on `x_t`, so a chain computes those of many steps in one product.
        """
        activated = F.silu(y)
        return [layer.adaLN_modulation[1](activated) for layer in (*self.res_blocks, self.final_layer)]

    def denoise(
        self, x_t: Float[Tensor, "n c"], y: Float[Tensor, "*g n w"] | Sequence[Tensor]
    ) -> Float[Tensor, "*g n o"]:
        """The prediction for an embedded condition `y = embed_time(t) + embed_context(context)`, or its `modulate(y)`.

        A chain embeds its contexts once for all steps, and its time steps once for all tokens. With guidance, `y` has
        the condition and the null condition stacked in front, and what depends on `x_t` alone is computed once.
        """
        activated = F.silu(y) if isinstance(y, Tensor) else None
        x = self.input_proj(x_t)
        for i, layer in enumerate((*self.res_blocks, self.final_layer)):
            # Of an embedded condition one layer's modulation at a time: all of a large batch's would fill the memory.
            x = layer(x, y[i] if activated is None else layer.adaLN_modulation[1](activated))
        return x

    def in_float32(self) -> "TokenHead":
        """A copy with float32 weights; the head itself where they are no less precise."""
        dtype = self.input_proj.weight.dtype
        return self if torch.promote_types(dtype, torch.float32) == dtype else copy.deepcopy(self).float()
