"""The pre-norm transformer block of ViT (Dosovitskiy et al. 2021), with timm's parameter names."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from marval.model.linear import Linear, linear


class Attention(nn.Module):
    """Multi-head self-attention whose queries may be a subset of the sequence."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "b n d"], queries: Float[Tensor, "b q d"] | None = None
    ) -> Float[Tensor, "b m d"]:
        """Attend from `queries` (rows of `x`; all of `x` when None) to every row of `x`."""
        if queries is None:
            q, k, v = (self._split(t) for t in self.qkv(x).chunk(3, dim=-1))
        else:
            dim = x.shape[-1]
            weight, bias = self.qkv.weight, self.qkv.bias
            q = self._split(linear(queries, weight[:dim], bias[:dim]))
            k, v = (self._split(t) for t in linear(x, weight[dim:], bias[dim:]).chunk(2, dim=-1))
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.proj(out.transpose(1, 2).flatten(2))

    def _split(self, t: Float[Tensor, "b n d"]) -> Float[Tensor, "b h n e"]:
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class MLP(nn.Module):
    """The two-layer GELU network of a block."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.fc2(linear(x, self.fc1.weight, self.fc1.bias, gelu=True))


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0, dropout: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b n d"], rows: Float[Tensor, "b q d"] | None = None) -> Float[Tensor, "b m d"]:
        """The block's output at `rows` (a gathered subset of `x`), or everywhere when None."""
        queries = None if rows is None else self.norm1(rows)
        rows = x if rows is None else rows
        rows = rows + self.drop(self.attn(self.norm1(x), queries))
        return rows + self.drop(self.mlp(self.norm2(rows)))
