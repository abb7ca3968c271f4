"""What a full-size run needs: memory, arithmetic, disk and days. Nothing is allocated.

    python tools/plan.py imagenet256-base imagenet256-large imagenet256-huge
    python tools/plan.py imagenet256-base --gpus 4 --gpu-memory 24 --tflops 165 --efficiency 0.3

The steps of training run on fake tensors, which have shapes but no storage; what is alive is added up, and the
operations are counted.
"""

import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
import tyro
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop
from tyro.conf import Positional

from marval.config import MARConfig, Size
from marval.evaluate.results import write_results
from marval.losses.gsim import phi_loss, theta_loss
from marval.model import MAR, NoiseSchedule, TokenHead
from marval.model.mar import Block
from marval.presets import IMAGENET_IMAGES, DistillConfig, TuneConfig
from marval.runtime.provenance import made_by
from marval.sampling import DrawInOneStep, draw_counts, run
from marval.sampling.loop import Start
from marval.train.distill import predicted_eps, student_tokens, target_contexts

GIB = 2**30
FLOAT32 = 4
FLOAT32_EFFICIENCY = 0.8  # of a GPU's float32 peak without tensor cores, which large products come near
CACHE_BYTES_PER_CHANNEL = 2 * 2 * 2  # an image and its mirror, mean and log-variance, half precision
aten = torch.ops.aten
COUNTED = {
    **flop_registry,  # of attention, torch counts only what runs on a GPU
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}

Step = Callable[[int, bool], "Meter"]  # of so many images, with blocks that are recomputed or kept


class Meter(TorchDispatchMode):
    """Adds up the bytes of the tensors that are alive while it is active, and the operations by precision."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.flops = {torch.bfloat16: 0, torch.float32: 0}
        self.seen: weakref.WeakKeyDictionary[torch.UntypedStorage, bool] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        if count := COUNTED.get(function._overloadpacket):
            self.flops[args[0].dtype] += count(*args, **(kwargs or {}), out_val=result)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage, once, until it is freed."""
        if storage not in self.seen:
            self.seen[storage] = True
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.now -= size


def distill_step(config: MARConfig, settings: DistillConfig, images: int, recompute: bool, masked: int) -> Meter:
    """One part of an update of stage 1, with `masked` tokens hidden of each image."""
    schedule, draw, targets = NoiseSchedule.full(), DrawInOneStep(), min(settings.tokens_per_image, masked)
    with FakeTensorMode(allow_non_fake_inputs=True):
        teacher, student = MAR(config).eval().requires_grad_(False), MAR(config).eval()
        phi = TokenHead(
            config.token_dim, config.decoder_dim, config.head_width, config.head_depth, config.learn_variance
        )
        student.checkpoint_blocks = recompute
        free_gradients(student, phi)
        places = torch.arange(config.num_tokens).expand(images, -1)
        visible, hidden = places[:, : config.num_tokens - masked], places[:, config.num_tokens - masked :][:, :targets]
        tokens, labels = torch.randn(images, config.num_tokens, config.token_dim), torch.zeros(images, dtype=torch.long)
        inputs = (tokens, visible, hidden, labels)
        z, eps = (torch.randn(images * targets, config.token_dim) for _ in range(2))
        t, w, autocast = torch.zeros(len(z), dtype=torch.long), settings.guidance or 2.0, settings.autocast
        with Meter() as meter:
            with torch.no_grad():
                c = target_contexts(teacher, inputs, guided=w != 1.0, autocast=autocast)
            x_0 = student_tokens(student, draw, inputs, z, autocast)
            phi.requires_grad_(False)
            x_t = schedule.add_noise(x_0, eps, t)
            teacher_eps, phi_eps = predicted_eps(teacher.head, x_t, t, c, w), predicted_eps(phi, x_t, t, c[:1])
            theta_loss(settings.objective, teacher_eps, phi_eps, eps)[0].backward()
            phi.requires_grad_(True)
            x_0 = x_0.detach()
            del x_t, teacher_eps, phi_eps
            for _ in range(settings.auxiliary_steps):
                phi_loss(predicted_eps(phi, schedule.add_noise(x_0, eps, t), t, c[:1]), eps).backward()
    return meter


def tune_step(config: MARConfig, settings: TuneConfig, images: int, recompute: bool, iterations: int) -> Meter:
    """The drawing of stage 2 with its backward pass, of the last `iterations` of K only."""
    draw, counts = DrawInOneStep(), draw_counts(config.num_tokens, settings.iterations)[-iterations:]
    known = config.num_tokens - sum(counts)
    with FakeTensorMode(allow_non_fake_inputs=True):
        student = MAR(config).eval()
        student.checkpoint_blocks = recompute
        free_gradients(student)
        tokens = torch.zeros(images, config.num_tokens, config.token_dim)
        order = torch.arange(config.num_tokens).expand(images, -1)
        start = Start(tokens, order, known, counts, torch.randn(1, *tokens.shape))
        labels = torch.zeros(images, dtype=torch.long)
        how: dict[str, Any] = {"gradient_iterations": settings.gradient_iterations, "autocast": settings.autocast}
        with Meter() as meter:
            *_, (tokens, _) = run(student, draw, student.embed(labels), start, **how)
            tokens.sum().backward()
    return meter


def free_gradients(*networks: nn.Module) -> None:
    """Free every gradient as soon as it is whole: the plan counts their lasting (sharded) copies apart."""

    def free(parameter: Tensor) -> None:
        parameter.grad = None

    for network in networks:
        for parameter in network.parameters():
            parameter.register_post_accumulate_grad_hook(free)


def mean_mask_ratio(settings: DistillConfig) -> float:
    """The mean of the cut normal that mask ratios are drawn from (a normal around 1, cut to [ratio_min, 1])."""
    normal = torch.distributions.Normal(1.0, settings.mask_ratio_std)
    low = torch.tensor(settings.mask_ratio_min)
    mass = 0.5 - normal.cdf(low)
    density = normal.log_prob(low).exp() - normal.log_prob(torch.tensor(1.0)).exp()
    return float(1 + settings.mask_ratio_std**2 * density / mass)


def cache_bytes(latent_channels: int = 16, side: int = 16, images: int = IMAGENET_IMAGES) -> int:
    """Size of a cache of latents (`marval cache`)."""
    return images * CACHE_BYTES_PER_CHANNEL * latent_channels * side * side


def network_sizes(config: MARConfig) -> dict[str, int]:
    """Parameters of the whole network, its head, its largest block, and what lies outside blocks and head."""

    def count(network: nn.Module) -> int:
        return sum(parameter.numel() for parameter in network.parameters())

    with torch.device("meta"):
        model = MAR(config)
    blocks = [count(module) for module in model.modules() if isinstance(module, Block)]
    total, head = count(model), count(model.head)
    return {"MAR": total, "head": head, "block": max(blocks), "outside blocks": total - head - sum(blocks)}


def distill_row(config: MARConfig, settings: DistillConfig, machine: Mapping[str, Any]) -> dict[str, Any]:
    """Stage 1: student, its EMA, teacher and auxiliary network."""
    masked = round(config.num_tokens * mean_mask_ratio(settings))

    def step(images: int, recompute: bool) -> Meter:
        return distill_step(config, settings, images, recompute, masked)

    sizes, whole = network_sizes(config), step(1, settings.checkpoint_blocks)
    networks = dict.fromkeys(("student", "EMA", "teacher"), sizes["MAR"]) | {"auxiliary": sizes["head"]}
    return {"stage": "distill", **_row(sizes, networks, ("student", "auxiliary"), settings, machine, step, whole)}


def tune_row(config: MARConfig, settings: TuneConfig, machine: Mapping[str, Any]) -> dict[str, Any]:
    """Stage 2: student and its EMA. The VAE's decoder and the reward, which are the user's choice, come on top."""

    def step(images: int, recompute: bool) -> Meter:
        return tune_step(config, settings, images, recompute, settings.gradient_iterations)

    sizes, whole = (
        network_sizes(config),
        tune_step(config, settings, 1, settings.checkpoint_blocks, settings.iterations),
    )
    networks = {"student": sizes["MAR"], "EMA": sizes["MAR"]}
    return {"stage": "tune", **_row(sizes, networks, ("student",), settings, machine, step, whole)}


def _row(
    sizes: Mapping[str, int],
    networks: Mapping[str, int],
    trained: tuple[str, ...],
    settings: DistillConfig | TuneConfig,
    machine: Mapping[str, Any],
    step: Step,
    whole: Meter,
) -> dict[str, Any]:
    """A stage's row of the results: memory of a GPU in GiB, operations of an update, and days.

    Of the activations, `kept` are without recomputation and `recomputed` with `--checkpoint-blocks`; `images` is how
    many of the batch fit at a time. `float32_tflops` is a GPU's peak without tensor cores, which the training loops do
    not use in float32 (torch's default: no TF32).

    Args:
        step: measures a part of an update.
        whole: an update of one image.
    """
    gpus, learnt = machine["gpus"], FLOAT32 * sum(networks[name] for name in trained)
    gathered = 0 if gpus == 1 else FLOAT32 * (sizes["outside blocks"] + 2 * max(sizes["block"], sizes["head"]))
    held = {"weights": FLOAT32 * sum(networks.values()) / gpus, "gradients": learnt / gpus}
    held |= {"optimiser": 2 * learnt / gpus, "gathered": float(gathered)}
    row: dict[str, Any] = {**machine, "batch": settings.batch_size, "updates": settings.updates}
    row |= {"parameters": dict(networks), **{f"{name}_gib": value / GIB for name, value in held.items()}}
    for how, recompute in (("kept", False), ("recomputed", True)):
        some, twice = step(8, recompute).peak, step(16, recompute).peak  # with fewer, the weights' copies hide the rest
        fixed, each = 2 * some - twice, (twice - some) / 8
        fit = max(0, int((machine["gpu_gib"] * GIB - sum(held.values()) - fixed) // each))
        row |= {f"{how}_fixed_gib": fixed / GIB, f"{how}_image_mib": each / 2**20}
        row |= {f"{how}_images": min(fit, -(-settings.batch_size // gpus))}
    half, single = (settings.batch_size * whole.flops[dtype] for dtype in (torch.bfloat16, torch.float32))
    seconds = half / (machine["tflops"] * 1e12 * machine["efficiency"])
    seconds += single / (machine["float32_tflops"] * 1e12 * FLOAT32_EFFICIENCY)
    row |= {"pflop_per_step": (half + single) / 1e15, "float32_pflop_per_step": single / 1e15}
    return row | {"days": settings.updates * seconds / gpus / 86400}


def report(row: Mapping[str, Any]) -> list[str]:
    """A stage's plan in lines."""
    networks = ", ".join(f"{name} {number / 1e6:.1f}M" for name, number in row["parameters"].items())
    held = ", ".join(f"{name} {row[f'{name}_gib']:.2f}" for name in ("weights", "gradients", "optimiser", "gathered"))
    lines = ["", f"{row['stage']}: {row['updates']} updates of {row['batch']} images on {row['gpus']} GPUs"]
    lines += [f"  parameters: {networks}", f"  GiB a GPU: {held} (layers at a time)"]
    for how, label in (("kept", "without recomputation"), ("recomputed", "with --checkpoint-blocks")):
        fit = row[f"{how}_images"]
        parts = f"--accumulate {-(-row['batch'] // (row['gpus'] * fit))}" if fit else "not even one image fits"
        lines.append(
            f"  activations {label}: {row[f'{how}_fixed_gib']:.2f} GiB + {row[f'{how}_image_mib']:.0f} MiB an image; "
            f"in {row['gpu_gib']:.0f} GiB: {fit} images at a time ({parts})"
        )
    lines.append(
        f"  {row['pflop_per_step']:.2f} PFLOP an update, {row['float32_pflop_per_step']:.2f} of them the heads' in "
        f"float32; {row['days']:.2f} days at {row['efficiency']:.0%} of {row['tflops']:.0f} TFLOP/s in bf16 and "
        f"{FLOAT32_EFFICIENCY:.0%} of {row['float32_tflops']:g} in float32 a GPU"
    )
    return lines


def main(
    presets: Positional[tuple[Literal["imagenet256-base", "imagenet256-large", "imagenet256-huge"], ...]],
    gpus: int = 8,
    gpu_memory: float = 80.0,
    tflops: float = 312.0,
    efficiency: float = 0.35,
    float32_tflops: float = 19.5,
    out: Path | None = None,
) -> None:
    """Print what each preset's two stages need.

    Args:
        presets: the sizes of the networks and the recipes of both stages.
        gpus: processes that share the work, one on each GPU.
        gpu_memory: of one GPU, in GiB.
        tflops: peak of one GPU in bf16, in TFLOP/s (A100: 312, H100: 989).
        efficiency: the share of that peak that the transformers reach: a guess.
        float32_tflops: peak of one GPU in float32 without tensor cores (A100: 19.5, H100: 67), for the heads.
        out: a JSON file that keeps the figures.
    """
    if not presets or min(gpus, gpu_memory, tflops, efficiency, float32_tflops) <= 0:
        raise ValueError("name at least one preset; the numbers must be above 0")
    machine = {"gpus": gpus, "gpu_gib": gpu_memory, "tflops": tflops, "efficiency": efficiency}
    machine |= {"float32_tflops": float32_tflops}
    rows: list[dict[str, Any]] = []
    print(f"cache of latents: {cache_bytes() / 1e9:.1f} GB for {IMAGENET_IMAGES} images and their mirrors")
    for preset in presets:
        size = cast(Size, preset.removeprefix("imagenet256-"))
        config, distill, tune = (
            MARConfig.imagenet256(size),
            DistillConfig.imagenet256(size),
            TuneConfig.imagenet256(size),
        )
        stages = [distill_row(config, distill, machine), tune_row(config, tune, machine)]
        print("\n".join(["", f"{preset}:", *(line for row in stages for line in report(row))]))
        rows += [{"preset": preset, **row} for row in stages]
    print("\ntune: the VAE's decoder and the reward are not counted.")
    if out is not None:
        made = made_by(torch.device("cpu"))
        write_results(out, "plan", [{**row, "made": made} for row in rows])


if __name__ == "__main__":
    tyro.cli(main)
