"""What a full-size run needs: memory, arithmetic, disk and days. Nothing is allocated.

    python tools/plan.py imagenet256-base imagenet256-large imagenet256-huge
    python tools/plan.py imagenet256-base --gpus 4 --gpu-memory 24 --tflops 165 --efficiency 0.3

Memory comes from running the very steps of training on fake tensors, which have shapes but no storage, and adding up
what is alive; floating-point operations come from formulas (`marval.evaluate.flops`).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import tyro
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from tyro.conf import Positional

from marval.config import MARConfig, Size
from marval.evaluate.flops import Flops, context_flops, embedding_flops, head_flops, iteration_flops
from marval.evaluate.memory import LiveMemory
from marval.evaluate.results import write_results
from marval.losses.gsim import phi_loss, theta_loss
from marval.model import MAR, NoiseSchedule, TokenHead
from marval.model.mar import Block
from marval.presets import IMAGENET_IMAGES, DistillConfig, TuneConfig
from marval.runtime.provenance import made_by
from marval.sampling import DrawInOneStep, draw_counts, model_contexts
from marval.train.distill import predicted_eps, student_tokens, target_contexts

GIB = 2**30
FLOAT32 = 4
FLOAT32_EFFICIENCY = 0.8  # of a GPU's float32 peak without tensor cores, which large products come near
CACHE_BYTES_PER_CHANNEL = 2 * 2 * 2  # an image and its mirror, mean and log-variance, half precision


@dataclass(frozen=True)
class Plan:
    """What one stage of a run needs."""

    parameters: dict[str, int]  # of every network
    weights: int  # bytes on one GPU, of all networks
    gradients: int
    optimizer: int
    gathered: int  # whole layers that `fully_shard` gathers while they compute; 0 on one GPU
    activations: dict[bool, tuple[int, int]]  # bytes without and with recomputation: fixed, and for one image
    bf16_flops: int  # of a step, all GPUs together: the transformers, where the settings have autocast
    float32_flops: int  # the heads; everything without autocast
    steps: int
    batch: int

    def peak(self, images: int, recompute: bool) -> int:
        """Bytes on one GPU with `images` of the batch at a time."""
        fixed, each = self.activations[recompute]
        return self.weights + self.gradients + self.optimizer + self.gathered + fixed + each * images

    def images_that_fit(self, memory: int, recompute: bool) -> int:
        """The most images at a time in `memory` bytes; 0 when not even one fits."""
        return max(0, (memory - self.peak(0, recompute)) // self.activations[recompute][1])

    @property
    def flops(self) -> int:
        """Operations of a step, all GPUs together."""
        return self.bf16_flops + self.float32_flops

    def seconds(self, gpus: int, peak_flops: float, efficiency: float, float32_flops: float) -> float:
        """Time of the whole run on GPUs that reach a share `efficiency` of `peak_flops` in bf16.

        `float32_flops` is the peak of a GPU in float32 without tensor cores, which the training loops do not use there
        (torch's default: no TF32); of it `FLOAT32_EFFICIENCY` is reached.
        """
        step = self.bf16_flops / (peak_flops * efficiency) + self.float32_flops / (float32_flops * FLOAT32_EFFICIENCY)
        return self.steps * step / gpus


def plan_distill(config: MARConfig, settings: DistillConfig, gpus: int) -> Plan:
    """Stage 1: student, its EMA, teacher and auxiliary network."""
    sizes = network_sizes(config)
    networks = dict.fromkeys(("student", "EMA", "teacher"), sizes["MAR"]) | {"auxiliary": sizes["head"]}
    conditions = 1 if settings.guidance == 1.0 else 2
    masked = round(config.num_tokens * mean_mask_ratio(settings))
    targets = min(masked, settings.tokens_per_image)
    context = context_flops(config, config.num_tokens - masked, targets)
    one_call, guided_call = head_flops(config, targets), head_flops(config, targets, conditions)
    embeddings = embedding_flops(config, targets, 1, targets)
    contexts = context * conditions  # the teacher's, forward
    contexts += context * (4 if settings.checkpoint_blocks else 3)  # the student's, with its gradients
    heads = 3 * (one_call + embeddings)  # the student's
    heads += 2 * (one_call + guided_call)  # phi's and the teacher's: gradients of their input alone
    heads += 3 * settings.auxiliary_steps * (one_call + embeddings)  # phi learns
    flops = Flops(settings.batch_size * contexts, settings.batch_size * heads)
    return _plan(
        networks, sizes, ("student", "auxiliary"), gpus, flops, settings,
        lambda images, recompute: distill_memory(config, settings, images, recompute),
    )  # fmt: skip


def plan_tune(config: MARConfig, settings: TuneConfig, gpus: int) -> Plan:
    """Stage 2: student and its EMA. The VAE's decoder and the reward, which are the user's choice, come on top."""
    sizes = network_sizes(config)
    networks = {"student": sizes["MAR"], "EMA": sizes["MAR"]}
    counts, contexts, heads = draw_counts(config.num_tokens, settings.updates), 0, 0
    for k, count in enumerate(counts):
        once = iteration_flops(config, sum(counts[:k]), count, 1, guided=False)
        learnt = k >= settings.updates - settings.gradient_iterations
        contexts += once.context * (4 if learnt else 1)  # forward, recomputed, and twice that for the gradients
        heads += once.head * (1 if not learnt else 3 if settings.checkpoint_blocks else 4)  # blocks alone recompute
    flops = Flops(settings.batch_size * contexts, settings.batch_size * heads)
    return _plan(
        networks, sizes, ("student",), gpus, flops, settings,
        lambda images, recompute: tune_memory(config, settings, images, recompute),
    )  # fmt: skip


def _plan(
    networks: dict[str, int],
    sizes: dict[str, int],
    trained: tuple[str, ...],
    gpus: int,
    flops: Flops,
    settings: DistillConfig | TuneConfig,
    memory: Callable[[int, bool], int],
) -> Plan:
    activations = {}
    for recompute in (False, True):
        some, twice = memory(8, recompute), memory(16, recompute)  # with fewer, the weights' copies hide the rest
        activations[recompute] = (2 * some - twice, (twice - some) // 8)
    learnt = FLOAT32 * sum(networks[name] for name in trained)
    return Plan(
        parameters=networks,
        weights=FLOAT32 * sum(networks.values()) // gpus,
        gradients=learnt // gpus,
        optimizer=2 * learnt // gpus,
        gathered=0 if gpus == 1 else FLOAT32 * (sizes["outside blocks"] + 2 * max(sizes["block"], sizes["head"])),
        activations=activations,
        bf16_flops=flops.context if settings.autocast else 0,
        float32_flops=flops.head if settings.autocast else flops.total,
        steps=settings.updates,
        batch=settings.batch_size,
    )


def network_sizes(config: MARConfig) -> dict[str, int]:
    """Parameters of a MAR, of its head, of its largest block and of what is in neither."""
    with torch.device("meta"):
        model = MAR(config)
    blocks = [count(module) for module in model.modules() if isinstance(module, Block)]
    total, head = count(model), count(model.head)
    return {"MAR": total, "head": head, "block": max(blocks), "outside blocks": total - head - sum(blocks)}


def count(network: nn.Module) -> int:
    """Parameters of a network."""
    return sum(parameter.numel() for parameter in network.parameters())


def mean_mask_ratio(settings: DistillConfig) -> float:
    """The mean of the cut normal that mask ratios are drawn from (a normal around 1, cut to [ratio_min, 1])."""
    normal = torch.distributions.Normal(1.0, settings.mask_ratio_std)
    low = torch.tensor(settings.mask_ratio_min)
    mass = 0.5 - normal.cdf(low)
    density = normal.log_prob(low).exp() - normal.log_prob(torch.tensor(1.0)).exp()
    return float(1 + settings.mask_ratio_std**2 * density / mass)


def fake_tensors() -> AbstractContextManager[Any]:
    """Tensors made inside have shapes and types but no memory."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def distill_memory(
    config: MARConfig, settings: DistillConfig, images: int, recompute: bool, masked: int | None = None
) -> int:
    """Bytes that one part of `images` images adds to weights, gradients and optimiser states, at its peak.

    Args:
        masked: tokens hidden of each image; their mean number when None.
    """
    schedule, draw = NoiseSchedule.full(), DrawInOneStep()
    settings = dataclasses.replace(settings, guidance_schedule="constant", guidance=settings.guidance or 2.0)
    masked = round(config.num_tokens * mean_mask_ratio(settings)) if masked is None else masked
    shown, targets = config.num_tokens - masked, min(settings.tokens_per_image, masked)
    with fake_tensors():
        teacher, student = MAR(config).eval().requires_grad_(False), MAR(config).eval()
        auxiliary = TokenHead(
            config.token_dim, config.decoder_dim, config.head_width, config.head_depth, config.learn_variance
        )
        student.checkpoint_blocks = recompute
        places = torch.arange(config.num_tokens).expand(images, -1)
        z = torch.randn(images, targets, config.token_dim)
        inputs = (
            torch.randn(images, config.num_tokens, config.token_dim), places[:, :shown],
            places[:, shown : shown + targets], torch.zeros(images, dtype=torch.long),
        )  # fmt: skip
        t, eps = torch.zeros(images * targets, dtype=torch.long), torch.randn(images * targets, config.token_dim)
        for network in (student, auxiliary):
            _free_gradients(network)
        with LiveMemory() as live:
            w, autocast = settings.guidance or 2.0, settings.autocast
            with torch.no_grad():
                c = target_contexts(teacher, inputs, guided=w != 1.0, autocast=autocast)
            x_0 = student_tokens(student, draw, inputs, z.flatten(0, 1), autocast)
            auxiliary.requires_grad_(False)
            x_t = schedule.add_noise(x_0, eps, t)
            teacher_eps, phi_eps = predicted_eps(teacher.head, x_t, t, c, w), predicted_eps(auxiliary, x_t, t, c[:1])
            theta_loss(settings.objective, teacher_eps, phi_eps, eps, x_t)[0].backward()
            auxiliary.requires_grad_(True)
            x_0 = x_0.detach()
            del x_t, teacher_eps, phi_eps
            phi_loss(predicted_eps(auxiliary, schedule.add_noise(x_0, eps, t), t, c[:1]), eps).backward()
    return live.peak


def tune_memory(config: MARConfig, settings: TuneConfig, images: int, recompute: bool) -> int:
    """As `distill_memory`, for the backward pass of a tuning step.

    Without `recompute` that is one AR iteration, the largest: the others keep their tokens only. With it the last M
    iterations are all kept, but for what is inside their blocks.
    """
    counts = draw_counts(config.num_tokens, settings.updates)
    draw, largest = DrawInOneStep(), max(counts)
    starts = [(sum(counts[:k]), count) for k, count in enumerate(counts)][-settings.gradient_iterations :]
    shown_and_drawn = starts if recompute else [(config.num_tokens - largest, largest)]
    with fake_tensors():
        student = MAR(config).eval()
        student.checkpoint_blocks = recompute
        _free_gradients(student)
        places = torch.arange(config.num_tokens).expand(images, -1)
        labels = torch.zeros(images, dtype=torch.long)
        with LiveMemory() as live:
            tokens = torch.randn(images, config.num_tokens, config.token_dim, requires_grad=True)
            kept = [tokens * 1.0 for _ in range(settings.gradient_iterations)]
            total = kept[0].sum() * 0
            for shown, drawn in shown_and_drawn:
                positions = places[:, shown : shown + drawn]
                with torch.autocast("cpu", torch.bfloat16, enabled=settings.autocast):
                    context = model_contexts(student, kept[0], places[:, :shown], positions, labels, guided=False)
                noise = torch.randn(1, images * drawn, config.token_dim)
                total = total + draw(student.head, context[0].float(), None, 1.0, noise).sum()
            total.backward()
    return live.peak


def _free_gradients(network: nn.Module) -> None:
    """Free every gradient as soon as it is whole: the plan counts their lasting (sharded) copies apart."""

    def free(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in network.parameters():
        parameter.register_post_accumulate_grad_hook(free)


def cache_bytes(latent_channels: int = 16, side: int = 16, images: int = IMAGENET_IMAGES) -> int:
    """Size of a cache of latents (`marval cache`)."""
    return images * CACHE_BYTES_PER_CHANNEL * latent_channels * side * side


def plan_rows(
    size: Size, gpus: int, memory: int, peak_flops: float, efficiency: float, float32_flops: float
) -> list[dict[str, Any]]:
    """The plan of both stages of a preset on GPUs of `memory` bytes, as rows of a results file.

    Of the activations, `kept` are without recomputation and `recomputed` with `--checkpoint-blocks`; `images` is how
    many of the batch fit at a time.
    """
    config, rows = MARConfig.imagenet256(size), []
    plans = {
        "distill": plan_distill(config, DistillConfig.imagenet256(size), gpus),
        "tune": plan_tune(config, TuneConfig.imagenet256(size), gpus),
    }
    for stage, plan in plans.items():
        row: dict[str, Any] = {"preset": f"imagenet256-{size}", "stage": stage, "gpus": gpus, "gpu_gib": memory / GIB}
        row |= {"tflops": peak_flops / 1e12, "efficiency": efficiency, "batch": plan.batch, "steps": plan.steps}
        row |= {"float32_tflops": float32_flops / 1e12, "float32_pflop_per_step": plan.float32_flops / 1e15}
        row |= {"parameters": plan.parameters, "weights_gib": plan.weights / GIB, "gradients_gib": plan.gradients / GIB}
        row |= {"optimiser_gib": plan.optimizer / GIB, "gathered_gib": plan.gathered / GIB}
        for how, (fixed, each) in zip(
            ("kept", "recomputed"), (plan.activations[r] for r in (False, True)), strict=True
        ):
            images = min(plan.images_that_fit(memory, how == "recomputed"), -(-plan.batch // gpus))
            row |= {f"{how}_fixed_gib": fixed / GIB, f"{how}_image_mib": each / 2**20, f"{how}_images": images}
        days = plan.seconds(gpus, peak_flops, efficiency, float32_flops) / 86400
        rows.append(row | {"pflop_per_step": plan.flops / 1e15, "days": days})
    return rows


def accumulated(row: Mapping[str, Any], images: int) -> int:
    """Parts that one GPU's share of a batch goes in, `images` at a time."""
    return -(-row["batch"] // (row["gpus"] * images))


def report(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A preset's plan in lines."""
    lines = [f"cache of latents: {cache_bytes() / 1e9:.1f} GB for {IMAGENET_IMAGES} images and their mirrors"]
    for row in rows:
        networks = ", ".join(f"{name} {number / 1e6:.1f}M" for name, number in row["parameters"].items())
        lines += ["", f"{row['stage']}: {row['steps']} steps of {row['batch']} images on {row['gpus']} GPUs"]
        lines.append(f"  parameters: {networks}")
        kept = {name: row[f"{name}_gib"] for name in ("weights", "gradients", "optimiser")}
        kept |= {"gathered layers": row["gathered_gib"]} if row["gpus"] > 1 else {}
        lines.append("  GiB a GPU: " + ", ".join(f"{name} {value:.2f}" for name, value in kept.items()))
        for how, named in (("kept", "without recomputation"), ("recomputed", "with --checkpoint-blocks")):
            fit = row[f"{how}_images"]
            parts = f"--accumulate {accumulated(row, fit)}" if fit else "not even one image fits"
            lines.append(
                f"  activations {named}: {row[f'{how}_fixed_gib']:.2f} GiB + {row[f'{how}_image_mib']:.0f} MiB an "
                f"image; in {row['gpu_gib']:.0f} GiB: {fit} images at a time ({parts})"
            )
        lines.append(
            f"  {row['pflop_per_step']:.2f} PFLOP a step, {row['float32_pflop_per_step']:.2f} of them the heads' in "
            f"float32; {row['days']:.2f} days at {row['efficiency']:.0%} of {row['tflops']:.0f} TFLOP/s in bf16 and "
            f"{FLOAT32_EFFICIENCY:.0%} of {row['float32_tflops']:g} in float32 a GPU"
        )
    lines += ["", "tune: the VAE's decoder and the reward are not counted."]
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
    rows = []
    for preset in presets:
        size = cast(Size, preset.removeprefix("imagenet256-"))
        rows += plan_rows(size, gpus, int(gpu_memory * GIB), tflops * 1e12, efficiency, float32_tflops * 1e12)
        print("\n".join([f"{preset}:", *report(rows[-2:])]))
    if out is not None:
        made = made_by(torch.device("cpu"))
        write_results(out, "plan", [{**row, "made": made} for row in rows], 0)


if __name__ == "__main__":
    tyro.cli(main)
