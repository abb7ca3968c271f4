"""The blocks of a transformer: the pre-norm blocks of ViT (Dosovitskiy et al. 2021), with the official names."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from marval.config import MARConfig


class KeyValues(NamedTuple):
    """The keys and values that a layer keeps, of every head: the first `length` rows; the others are free."""

    room: int  # for all rows that there will be
    rows: Float[Tensor, "2 b h n e"] | None = None
    length: int = 0

    def extended(self, new: Float[Tensor, "2 b h m e"]) -> "KeyValues":
        """With more rows; without gradients they are written where there is room, which `self` then shares."""
        end, rows = self.length + new.shape[3], self.rows
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            rows = new if rows is None else torch.cat([rows[..., : self.length, :], new], dim=3)
            return KeyValues(self.room, rows, end)
        if rows is None or rows.shape[3] < end:
            rows = new.new_empty(*new.shape[:3], self.room, new.shape[4])
            if self.rows is not None:
                rows[..., : self.length, :] = self.rows[..., : self.length, :]
        rows[..., self.length : end, :] = new
        return KeyValues(self.room, rows, end)

    def pair(self) -> tuple[Float[Tensor, "b h k e"], Float[Tensor, "b h k e"]]:
        """The keys and the values, once there are some."""
        assert self.rows is not None
        return self.rows[0, :, :, : self.length], self.rows[1, :, :, : self.length]


def gather_rows(x: Float[Tensor, "b n d"], index: Int[Tensor, "b m"]) -> Float[Tensor, "b m d"]:
    """Row `index[i, j]` of `x[i]`, for every i and j."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


class Attention(nn.Module):
    """Multi-head self-attention whose queries may be a subset of the sequence."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        queries: Float[Tensor, "b q d"] | None = None,
        past: KeyValues | None = None,
        mask: Bool[Tensor, "q k"] | None = None,
    ) -> tuple[Float[Tensor, "b m d"], KeyValues | None]:
        """Attend from `queries` (rows of `x`; all of `x` when None) to every row of `x`, and to those of the past.

        Args:
            past: keys and values of earlier rows; where it is given, it is returned with those of `x`.
            mask: which rows each query reads; all when None.
        """
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.project(x, queries))
        if past is not None:
            past = past.extended(torch.stack((k, v)))
            k, v = past.pair()
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=self.dropout if self.training else 0.0)
        return self.proj(out.transpose(1, 2).flatten(2)), past

    def project(self, x: Float[Tensor, "b n d"], queries: Float[Tensor, "b q d"] | None) -> tuple[Tensor, ...]:
        """The queries, of `queries` only, and the keys and values of all of `x`."""
        if queries is None:
            return self.qkv(x).chunk(3, dim=-1)
        dim, weight, bias = x.shape[-1], self.qkv.weight, self.qkv.bias
        keys_values = F.linear(x, weight[dim:], bias[dim:])
        return F.linear(queries, weight[:dim], bias[:dim]), *keys_values.chunk(2, dim=-1)


class MLP(nn.Module):
    """The two-layer GELU network of a block."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0, dropout: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        rows: Float[Tensor, "b q d"] | None = None,
        past: KeyValues | None = None,
        mask: Bool[Tensor, "q k"] | None = None,
    ) -> Float[Tensor, "b m d"] | tuple[Float[Tensor, "b m d"], KeyValues | None]:
        """The block's output at `rows` (a gathered subset of `x`), or everywhere when None.

        Args:
            past: see `Attention`; where it is given, the new one is returned as well.
            mask: see `Attention`.
        """
        queries = None if rows is None else self.norm1(rows)
        rows = x if rows is None else rows
        attended, kept = self.attn(self.norm1(x), queries, past, mask)
        rows = rows + self.drop(attended)
        rows = rows + self.drop(self.mlp(self.norm2(rows)))
        return rows if past is None else (rows, kept)


def blocks(depth: int, dim: int, heads: int, config: MARConfig) -> nn.ModuleList:
    """A stack of `depth` blocks."""
    return nn.ModuleList([Block(dim, heads, config.mlp_ratio, config.dropout) for _ in range(depth)])
