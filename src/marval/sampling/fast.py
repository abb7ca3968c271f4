"""Prepare a model for the device that it draws on: the one place for what depends on hardware.

On a CPU, torch gives float32 matrix products to MKL, whose fastest kernels are for Intel's processors: on a Zen 5 a
product of 80 x 768 x 2304 ran at 92 GFLOP/s a thread by MKL, at 204 by oneDNN. In all, MKL took 1.6 to 2.7 times as
long there at 53 to 3,392 rows, and 1.6 to 2.4 times at 1 to 32 rows of weights of 1,024 x 1,024 and larger. Another
machine ran the official loop 1.5 times as fast, and ours 1.6 times as slowly (results/mar-base-second.json).
"""

import contextlib
import copy
import functools
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from marval.config import MARConfig
from marval.model.blocks import MLP, Attention, Block
from marval.model.head import ExactLinear, FinalLayer, ResBlock, TokenHead
from marval.model.mar import MAR

FEWEST_ROWS = 16  # of an input: below, oneDNN's set-up costs more than its kernels save,
LARGE = 2**19  # but for weights of so many elements: reading them takes oneDNN half of MKL's time
FEWEST_CALLS = 25  # of the head, from which on packing its large weights saves more than it takes
MOST_COMPILED = 64  # forms of a block's inputs: precision, with gradients or not, one image or several
ONE_THREAD = 2**16  # numbers in the decoder's input, up to which one thread draws a batch faster than two

M = TypeVar("M", bound=nn.Module)


@functools.cache
def use_onednn() -> bool:
    """Tell whether this machine's products are oneDNN's: it is there, and the processor is none of those MKL is for."""
    try:
        about = Path("/proc/cpuinfo").read_text()
    except OSError:
        about = platform.processor()
    return torch.backends.mkldnn.is_available() and "GenuineIntel" not in about


def can_use_onednn(weight: Tensor) -> bool:
    """Tell whether oneDNN's operator takes this weight. It has no gradient, and autocast does not know it."""
    return (
        not torch.compiler.is_compiling()
        and use_onednn()
        and weight.is_cpu
        and weight.dtype == torch.float32
        and torch.is_inference_mode_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def linear(
    x: Float[Tensor, "*n d"], weight: Float[Tensor, "o d"], bias: Float[Tensor, " o"] | None, gelu: bool = False
) -> Float[Tensor, "*n o"]:
    """`x W^T + b`, or its GELU, by oneDNN where that is possible and faster."""
    few = FEWEST_ROWS if weight.numel() < LARGE else 0
    if x.dtype == weight.dtype and x.numel() >= few * x.shape[-1] and can_use_onednn(weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "none")
    y = F.linear(x, weight, bias)
    return F.gelu(y) if gelu else y


class FastLinear(nn.Linear):
    """`nn.Linear` by `linear`."""

    packed: Tensor | None = None  # the weight in oneDNN's own layout

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n o"]:
        return linear(x, self.weight if self.packed is None else self.packed, self.bias)


class FastExactLinear(ExactLinear):
    """`ExactLinear` by `linear`."""

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n o"]:
        if x.dtype == self.weight.dtype and can_use_onednn(self.weight):
            return linear(x, self.weight, self.bias)
        return super().forward(x)


class FastMLP(MLP):
    """`MLP` with the GELU inside oneDNN's product."""

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.fc2(linear(x, self.fc1.weight, self.fc1.bias, gelu=True))


class FastAttention(Attention):
    """`Attention` with its projections by `linear`."""

    def project(self, x: Float[Tensor, "b n d"], queries: Float[Tensor, "b q d"] | None) -> tuple[Tensor, ...]:
        if queries is None:
            return super().project(x, None)
        dim, weight, bias = x.shape[-1], self.qkv.weight, self.qkv.bias
        keys_values = linear(x, weight[dim:], bias[dim:])
        return linear(queries, weight[:dim], bias[:dim]), *keys_values.chunk(2, dim=-1)


FAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FastLinear, ExactLinear: FastExactLinear, MLP: FastMLP, Attention: FastAttention,
}  # fmt: skip


def prepare_for_drawing(model: MAR, head_calls: int) -> MAR:
    """A copy of a model for one batch of images: it shares every weight, and multiplies by oneDNN on a CPU.

    Where oneDNN is of no use (on a GPU, with gradients, in half precision, sharded), the model itself.

    Args:
        head_calls: how often the head will be called; often enough, its large weights are packed once for all calls.
    """
    if type(model.mask_token) is not nn.Parameter or not can_use_onednn(model.mask_token):
        return model
    copied = _fast_copy(model)
    if head_calls >= FEWEST_CALLS:
        for layer in copied.head.modules():
            if isinstance(layer, FastLinear) and layer.weight.numel() >= LARGE:
                layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight)
    return copied


def _fast_copy(module: M) -> M:
    """A module of the fast classes around the same parameters, buffers and hooks; what is compiled stays itself."""
    if module._compiled_call_impl is not None:
        return module
    copied = object.__new__(FAST.get(type(module), type(module)))
    children = {name: None if child is None else _fast_copy(child) for name, child in module._modules.items()}
    copied.__dict__ = {**module.__dict__, "_modules": children}
    return copied  # type: ignore[return-value]


def joined_modulation(head: TokenHead) -> Callable[[Float[Tensor, "*n w"]], list[Float[Tensor, "*n _"]]]:
    """`head.modulate` as one product, where the host's launches take longer than a GPU's products."""
    layers = [layer.adaLN_modulation[1] for layer in (*head.res_blocks, head.final_layer)]
    weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
    sizes = [layer.out_features for layer in layers]
    return lambda y: list(F.linear(F.silu(y), weight, bias).split(sizes, dim=-1))


def compile_blocks(network: MAR | TokenHead, backend: str = "inductor") -> None:
    """Compile each block by `torch.compile` at its first call, for any number of tokens.

    All models of a process share what is compiled of a class. By default torch would stop at 8 forms of inputs, which
    two models of other precision use up, and then compute what is new launch by launch, with a warning in its own log.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_COMPILED)
    for block in network.modules():
        if isinstance(block, Block | ResBlock | FinalLayer) and not is_compiled(block):
            block.compile(dynamic=True, backend=backend)


def is_compiled(module: nn.Module) -> bool:
    """Tell whether a module, or one in it, is compiled."""
    return any(each._compiled_call_impl is not None for each in module.modules())


def cast_frozen(model: MAR) -> MAR:
    """A copy of a frozen model whose context network has the weights that autocast would cast at every call, in bf16.

    Under autocast it computes the same to the bit. The head stays in float32.
    """
    model = copy.deepcopy(model)
    head = set(model.head.modules())
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and not isinstance(layer, ExactLinear) and layer not in head:
            layer.bfloat16()
    return model


@contextlib.contextmanager
def few_threads(config: MARConfig, batch: int, device: torch.device) -> Iterator[None]:
    """Let one thread draw a small batch on a CPU whose threads wait passively: to wake the others takes longer.

    One picture of a student of 3.2 million parameters (K = 8) took 24 ms so, 49 ms with two threads; of 16, each 6.5 ms
    either way.
    """
    numbers = batch * (config.buffer_size + config.num_tokens) * config.decoder_dim
    passive = os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"
    if not passive or device.type != "cpu" or numbers > ONE_THREAD:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
