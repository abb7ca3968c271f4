"""What a GPU needs: nothing waits for the host in the AR loop, and a recorded loop draws what the loop draws.

Without a GPU a recording is played by calling the recorded function again, which writes to the same static results.
"""

import contextlib
import copy
import dataclasses
import gc
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from marval.config import Chain, LatentSpace, MARConfig, ModelConfig, OneStep
from marval.model import MAR
from marval.pipeline import Pipeline
from marval.sampling import DrawByChain, DrawInOneStep, graphs, prepare, run
from marval.sampling.graphs import Graphs
from marval.spaces import Latents
from processes import launch
from small import CHANNELS, DRAWS, TOKENS, kept_mask, randn, small_model, small_pipeline


class Launches(TorchDispatchMode):
    """Counts the operations, and lists those that wait for the device or bring data from another."""

    WAIT = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "lift_fresh")
    NOTHING = ("view", "slice", "select", "expand", "transpose", "unsqueeze", "split", "chunk", "to.", "alias",
               "promote", "flatten", "unflatten", "contiguous", "dropout")  # fmt: skip

    def __init__(self):
        super().__init__()
        self.count, self.waits = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, name = function(*args, **(kwargs or {})), str(function)
        devices = {x.device.type for x in (*args, result) if isinstance(x, torch.Tensor) and x.ndim}
        if any(word in name for word in self.WAIT) or len(devices) > 1:
            self.waits.append(name)
        self.count += not any(f"aten.{word}" in name for word in self.NOTHING)
        return result


CHAIN = Chain(guidance=3.0, diffusion_steps=20)


@pytest.mark.parametrize(("kind", "most"), [("one_step", 335), ("cached", 400), ("chain", 1650)])
def test_the_loop_of_a_full_size_model_waits_for_no_device_and_launches_little(kind, most, monkeypatch):
    """On torch's device without data, where a value that the host needs is an error."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # unknown there
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    with torch.device("meta"):
        config = dataclasses.replace(MARConfig.imagenet256("base"), cached=kind == "cached")
        model = MAR(config).eval().requires_grad_(False)
    draw = DrawByChain(CHAIN, device="meta") if kind == "chain" else DrawInOneStep(device="meta")
    noise = torch.zeros(draw.noise_draws, 1, 256, 16, device="meta")
    start = prepare(model, draw, iterations=2, seeds=[0], noise=noise)
    condition = model.embed(torch.tensor([0], device="meta"))
    with torch.inference_mode(), Launches() as launches:
        list(run(model, draw, condition, start))
    assert launches.waits == []
    assert launches.count / 2 <= most


@pytest.fixture
def recorded(monkeypatch):
    """Recordings on the CPU; returns how often each was made."""
    made = []

    def record(job, pool):
        results = job()
        made.append(results)

        def replay():
            for static, new in zip(results, job(), strict=True):
                static.copy_(new)

        return replay, results

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(Graphs, "serve", lambda self, tokens: self.work)
    return made


@pytest.mark.parametrize(
    ("kind", "network"), [("chain", {}), ("one_step", {}), ("one_step", {"joint_draw": True, "cached": True})]
)
@torch.inference_mode()
def test_a_recorded_loop_draws_what_the_loop_draws(kind, network, recorded):
    model, draw, loops = small_model(**network), DRAWS[kind], Graphs()
    known = (randn(2, TOKENS, CHANNELS), kept_mask([0, 5, 11], [1, 2, 3]))
    for call, (seeds, labels) in enumerate([([0, 1], [0, 1]), ([5, 9], [2, 0]), ([0, 1], [0, 1])]):
        condition = model.embed(torch.tensor(labels))
        for given in (None, known):
            start = prepare(model, draw, iterations=4, seeds=seeds, known=given)
            expected = list(run(model, draw, condition, start))
            drawn = list(loops.run(model, draw, condition, start))
            for (tokens, places), (right, right_places) in zip(drawn, expected, strict=True):
                assert torch.equal(tokens, right)
                assert torch.equal(places, right_places)
        assert len(recorded) == (0 if call == 0 else 2), "one for each form of the inputs, from its second call on"


@torch.inference_mode()
def test_the_oldest_recordings_go_and_a_failure_costs_no_picture(recorded, monkeypatch):
    model, draw, loops = small_model(), DRAWS["one_step"], Graphs()
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)

    def images(count):
        start = prepare(model, draw, iterations=2, seeds=range(count))
        condition = model.embed(torch.zeros(count, dtype=torch.long))
        return [tokens for tokens, _ in loops.run(model, draw, condition, start)][-1]

    for count in (1, 1, 2, 2, 1, 3, 3, 1):
        images(count)
    assert len(recorded) == 3, "that of 1 stayed, for it was used after that of 2"
    images(2)
    monkeypatch.setattr(graphs, "record", lambda job, pool: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.warns(UserWarning, match="out of memory"):
        drawn = images(2)
    assert drawn.shape == (2, TOKENS, CHANNELS)
    images(2)


class Read(TorchDispatchMode):
    """Lists the memory that operations read and did not make themselves."""

    def __init__(self):
        super().__init__()
        self.made, self.read = set(), {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and tensor.ndim:  # the host reads scalars itself, once
                memory = tensor.untyped_storage()
                if memory.data_ptr() not in self.made:
                    self.read[memory.data_ptr()] = StorageWeakRef(memory)
        made = {x.untyped_storage().data_ptr() for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)}
        self.made |= made - set(self.read)
        return result


@pytest.mark.parametrize("kind", [*DRAWS, "joint", "decoder"])
@torch.inference_mode()
def test_what_a_recording_reads_stays_in_its_place(kind, recorded, monkeypatch):
    """A graph reads memory by its place: on a GPU, a freed tensor's would hold another's numbers at the next replay."""
    model, loops, read, pipeline = small_model(joint_draw=kind == "joint"), Graphs(), [], latent_pipeline()

    def record(job, pool):
        with Read() as mode:
            results = job()
        read.extend(mode.read.values())
        return lambda: None, results

    monkeypatch.setattr(graphs, "record", record)
    for _ in range(2):
        if kind == "decoder":
            pipeline.decode(randn(1, TOKENS, CHANNELS))
            continue
        start = prepare(model, draw := copy.deepcopy(DRAWS.get(kind, DRAWS["one_step"])), iterations=4, seeds=[0, 1])
        list(loops.run(model, draw, model.embed(torch.tensor([0, 1])), start))
    draw = start = None
    gc.collect()
    assert len(read) > (2 if kind == "decoder" else len(list(model.parameters())) / 2)
    assert not [memory for memory in read if memory.expired()]


@torch.inference_mode()
def test_recordings_go_when_the_weights_move(recorded):
    model, draw, loops = small_model(), DRAWS["one_step"], Graphs()
    condition = model.embed(torch.tensor([0, 1]))
    start = prepare(model, draw, iterations=4, seeds=[0, 1])
    for calls in (1, 2):
        for _ in range(3):
            drawn = list(loops.run(model, draw, condition, start))[-1][0]
            assert torch.equal(drawn, list(run(model, draw, condition, start))[-1][0])
        assert len(recorded) == calls
        head = model.head.input_proj
        head.weight.data = head.weight.data + 0.1


def test_other_settings_of_the_draw_are_recorded_apart(recorded):
    pipeline, plain = small_pipeline("chain"), small_pipeline("chain")
    plain.graphs.work = False
    for call in range(3):
        for w in (1.5, 4.0):
            drawn, expected = (each.with_draw(guidance=w).sample([0, 1], seed=call) for each in (pipeline, plain))
            assert torch.equal(drawn, expected)
    assert len(recorded) == 2


def latent_pipeline():
    """A student on latents of a VAE of one convolution."""
    vae = torch.nn.Conv2d(CHANNELS, 3, 3, padding=1)
    vae.decode = lambda latents: SimpleNamespace(sample=vae(latents).tanh())
    space = LatentSpace((3, 4), "stand-in", vae_stride=1, latent_channels=CHANNELS, patch=1)
    config = ModelConfig(small_model().config, space, OneStep(), tuple("abcde"), 4)
    return Pipeline(small_model(), config, Latents(space, vae=vae))


def test_a_recorded_decoder_makes_the_pictures_that_the_decoder_makes(recorded):
    pipeline, plain = latent_pipeline(), latent_pipeline()
    pipeline.space.vae.load_state_dict(plain.space.vae.state_dict())
    plain.graphs.work = False
    for dtype, before in ((torch.float32, 0), (torch.bfloat16, 4)):
        pipeline.to(dtype=dtype), plain.to(dtype=dtype)
        for call, seed in enumerate([0, 5, 0]):
            for classes in ([0, 1], [3]):
                assert torch.equal(pipeline.sample(classes, seed=seed), plain.sample(classes, seed=seed))
            # Of the loop and of the decoder, for each number of images.
            assert len(recorded) == before + (4 if call else 0)
    pipeline.compile()
    assert not pipeline.graphs.loops.kept, "what was recorded was not compiled"


def test_large_batches_are_decoded_without_a_graph(recorded, monkeypatch):
    monkeypatch.setattr(graphs, "LARGEST_DECODED", 2 * TOKENS * CHANNELS)
    pipeline = latent_pipeline()
    for count in (2, 3):
        tokens = randn(count, TOKENS, CHANNELS)
        for _ in range(3):
            torch.testing.assert_close(pipeline.decode(tokens), pipeline.space.decode(tokens))
        assert len(recorded) == 1


def test_compiled_blocks_are_compiled_once_for_any_number_of_tokens():
    """In a process of its own: torch's compiler does not see through the checks of shapes that tests switch on."""
    launch("compiled_run.py", 1)
