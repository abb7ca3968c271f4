"""What a full-size run needs: memory, arithmetic, disk and days. Nothing is allocated.

    python tools/plan.py imagenet256-base imagenet256-large imagenet256-huge
    python tools/plan.py imagenet256-base --gpus 4 --gpu-memory 24 --tflops 165 --efficiency 0.3

The steps of training run on fake tensors, which have shapes but no storage; what is alive is added up, and the
operations are counted. With `--compile` torch's compiler decides what is kept for the backward pass, as in a run.
"""

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from marval.cli.options import run_script
from marval.config import MARConfig, Size
from marval.evaluate.results import write_results
from marval.io.files import check_output
from marval.losses.gsim import phi_loss
from marval.model import MAR, NoiseSchedule
from marval.model.blocks import Block
from marval.presets import IMAGENET_IMAGES, DistillConfig, TuneConfig
from marval.runtime.provenance import made_by
from marval.runtime.rng import generator
from marval.sampling import DrawInOneStep, draw_counts, run
from marval.sampling.fast import cast_frozen, compile_blocks
from marval.sampling.loop import Start
from marval.train.distill import Inputs, predicted_eps, student_loss, student_tokens, target_contexts
from marval.train.draws import NoiseLevels, masked_count
from tables import plan as table

GIB = 2**30
FLOAT32 = 4
TF32 = 0.5  # peak of float32 products on tensor cores, as training has them, over the bf16 peak
LATENTS_BYTES = 2 * 2 * 2 * 16**3  # of an image and its mirror in `marval cache`: mean and log-variance in 16 bits
aten = torch.ops.aten
COUNTED = {
    **flop_registry,  # of attention, torch counts only what runs on a GPU
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


class Meter(TorchDispatchMode):
    """Adds up the bytes of the tensors that are alive while it is active, and the operations by precision."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.flops = {torch.bfloat16: 0, torch.float32: 0}
        self.seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        if flops := COUNTED.get(function._overloadpacket):
            self.flops[args[0].dtype] += flops(*args, **(kwargs or {}), out_val=result)
        return result

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Let torch compile while this is active."""
        return True

    def _count(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def distill_step(config: MARConfig, settings: DistillConfig, images: int, recompute: bool, masked: int) -> Meter:
    """One part of an update of stage 1, with `masked` tokens hidden of each image."""
    schedule, draw, known = NoiseSchedule.full(), DrawInOneStep(), config.num_tokens - masked
    with FakeTensorMode(allow_non_fake_inputs=True):
        teacher, student = MAR(config).eval().requires_grad_(False), MAR(config).eval()
        phi = MAR(config).head
        student.checkpoint_blocks = recompute
        for network in (teacher, student, phi) if settings.compile else ():
            compile_blocks(network, "aot_eager_decomp_partition")
        places = torch.arange(config.num_tokens).expand(images, -1)
        targets, labels = places[:, known:][:, : settings.tokens_per_image], torch.zeros(images, dtype=torch.long)
        tokens = torch.randn(images, config.num_tokens, config.token_dim)
        inputs = Inputs(tokens, places[:, :known], targets, labels)
        z, eps = (torch.randn(targets.numel(), config.token_dim) for _ in range(2))
        levels, w = NoiseLevels(torch.zeros(len(z), dtype=torch.long), eps), settings.guidance or 2.0
        with Meter() as meter:
            with torch.no_grad():
                c = target_contexts(teacher, inputs, guided=w != 1.0, autocast=settings.autocast)
            x_0, _ = student_tokens(student, draw, inputs, draw.guidance, z, settings.autocast)
            phi.requires_grad_(False)
            student_loss((teacher.head, phi), schedule, x_0, levels, c, w, settings.objective)[0].backward()
            phi.requires_grad_(True)
            x_t = schedule.add_noise(x_0.detach(), eps, levels.t)
            for _ in range(settings.auxiliary_steps):
                phi_loss(predicted_eps(phi, x_t, levels.t, c[:1]), eps).backward()
    return meter


def tune_step(config: MARConfig, settings: TuneConfig, images: int, recompute: bool, iterations: int) -> Meter:
    """The drawing of stage 2 with its backward pass, of the last `iterations` of K only."""
    draw, counts = DrawInOneStep(), draw_counts(config.num_tokens, settings.default_iterations)[-iterations:]
    known = config.num_tokens - sum(counts)
    with FakeTensorMode(allow_non_fake_inputs=True):
        student = MAR(config).eval()
        student.checkpoint_blocks = recompute
        if settings.compile:
            compile_blocks(student, "aot_eager_decomp_partition")
        tokens = torch.zeros(images, config.num_tokens, config.token_dim)
        order = torch.arange(config.num_tokens).expand(images, -1)
        start = Start(tokens, order, known, counts, torch.randn(1, *tokens.shape))
        labels = torch.zeros(images, dtype=torch.long)
        how: dict[str, Any] = {"gradient_iterations": settings.gradient_iterations, "autocast": settings.autocast}
        with Meter() as meter:
            *_, (tokens, _) = run(student, draw, student.embed(labels), start, **how)
            tokens.sum().backward()
    return meter


def row_of(
    stage: str, config: MARConfig, settings: DistillConfig | TuneConfig, machine: Mapping[str, Any]
) -> dict[str, Any]:
    """A stage's row of the results: memory of a GPU in GiB, operations of an update, and days.

    Of the activations, `kept` are without recomputation and `recomputed` with `--checkpoint-blocks`; `images` is how
    many of the batch fit at a time. The VAE's decoder and the reward, which are the user's choice, come on top.
    """
    with torch.device("meta"):
        model = MAR(config)
    shards = machine["gpus"] if machine["shard"] else 1
    total, head, *blocks = (
        sum(parameter.numel() for parameter in network.parameters())
        for network in (model, model.head, *(module for module in model.modules() if isinstance(module, Block)))
    )
    step: Callable[..., Meter] = distill_step if stage == "distill" else tune_step
    if isinstance(settings, DistillConfig):
        how = (config.num_tokens, settings.mask_ratio_min, settings.mask_ratio_std, generator("plan"))
        masked = round(mean(masked_count(*how) for _ in range(1000)))
        parts, whole = config.num_tokens, masked  # memory must suffice for images that are hidden altogether
        networks, trained = {"student": total, "EMA": total, "teacher": total, "auxiliary": head}, total + head
    else:
        parts, whole = settings.gradient_iterations, settings.default_iterations
        networks, trained = {"student": total, "EMA": total}, total
    gpus, batch = machine["gpus"], settings.batch_size
    row = {"stage": stage, **machine, "batch": batch, "updates": settings.updates, "parameters": networks}
    row |= {"compile": settings.compile}
    gathered = 0 if shards == 1 else total - head - sum(blocks) + 2 * max(*blocks, head)
    held = {"weights": sum(networks.values()) / shards, "optimiser": 2 * trained / shards, "gathered": float(gathered)}
    if "teacher" in networks and settings.autocast and shards == 1:  # its context network is in bf16
        half = sum(p.numel() for p in cast_frozen(model).parameters() if p.dtype == torch.bfloat16)
        held["weights"] -= half / 2
    gradients = trained / shards
    row |= {f"{name}_gib": FLOAT32 * number / GIB for name, number in {**held, "gradients": gradients}.items()}
    for name, recompute in (("kept", False), ("recomputed", True)):
        # With fewer images the weights' copies and the gradients hide the rest.
        some, twice = (step(config, settings, images, recompute, parts).peak for images in (32, 64))
        fixed, each = 2 * some - twice, (twice - some) / 32
        room, share = machine["gpu_gib"] * GIB - FLOAT32 * sum(held.values()) - fixed, -(-batch // gpus)
        # Gradients come as activations go, but those of one part stay for the next.
        fit = share if room >= share * each else max(0, int((room - FLOAT32 * gradients) // each))
        row |= {f"{name}_fixed_gib": fixed / GIB, f"{name}_image_mib": each / 2**20, f"{name}_images": fit}
    flops = step(config, settings, 1, settings.checkpoint_blocks, whole).flops
    half, single = (batch * flops[dtype] for dtype in (torch.bfloat16, torch.float32))
    row |= {"pflop_per_step": (half + single) / 1e15, "float32_pflop_per_step": single / 1e15}
    seconds = (half + single / TF32) / machine["efficiency"] / (machine["tflops"] * 1e12)
    return row | {"days": settings.updates * seconds / gpus / 86400}


def main(
    presets: tuple[Literal["imagenet256-base", "imagenet256-large", "imagenet256-huge"], ...],
    *,
    gpus: int = 8,
    gpu_memory: float = 80.0,
    tflops: float = 312.0,
    efficiency: float = 0.35,
    shard: bool = False,
    compile: bool = False,
    out: Path | None = None,
) -> None:
    """Print what each preset's two stages need.

    Args:
        presets: the sizes of the networks and the recipes of both stages.
        gpus: processes that share the work, one on each GPU.
        gpu_memory: of one GPU, in GiB.
        tflops: peak of one GPU in bf16, in TFLOP/s (A100: 312, H100: 989).
        efficiency: the share of that peak that products reach (in float32, of half of it): a guess.
        shard: split the networks over the GPUs (`--shard`).
        compile: compile their blocks (`--compile`), which keeps less for the backward pass.
        out: a JSON file that keeps the figures.
    """
    if out is not None:
        check_output(out, folder=False)
    machine = {"gpus": gpus, "gpu_gib": gpu_memory, "tflops": tflops, "efficiency": efficiency, "shard": shard}
    rows: list[dict[str, Any]] = []
    for preset in presets:
        size = cast(Size, preset.removeprefix("imagenet256-"))
        for stage, recipe in (("distill", DistillConfig), ("tune", TuneConfig)):
            settings = dataclasses.replace(recipe.imagenet256(size), compile=compile)
            rows.append({"preset": preset, **row_of(stage, MARConfig.imagenet256(size), settings, machine)})
    print(table({"plan": rows}))
    print(f"On top: {LATENTS_BYTES * IMAGENET_IMAGES / 1e9:.1f} GB on disk for latents, the VAE's decoder, the reward")
    if out is not None:
        made = made_by(torch.device("cpu"))
        write_results(out, "plan", [{**row, "made": made} for row in rows])


if __name__ == "__main__":
    run_script(main)
