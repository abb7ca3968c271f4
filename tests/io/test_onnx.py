"""Students as ONNX files: onnxruntime draws what PyTorch draws."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch

from marval.config import LatentSpace, OneStep
from marval.io.onnx import Student, export_onnx
from marval.pipeline import Pipeline
from marval.runtime.rng import generator
from marval.sampling import draw_function, prepare, run
from marval.spaces import token_space
from tiny import tiny_config, tiny_model

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


STUDENT = dataclasses.replace(tiny_config(), draw=OneStep(clip=True))


def session(file):
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("cached", [False, True])
def test_the_command_writes_a_student_that_draws_the_same_images_in_onnxruntime(cached, tmp_path, marval):
    config, model, iterations = STUDENT, tiny_model(), 2
    model.config = dataclasses.replace(model.config, cached=cached)
    config = dataclasses.replace(config, mar=model.config)
    Pipeline(model, config).save(tmp_path / "student")
    done = marval("convert", "onnx", "student", "a/student.onnx", "--iterations", 2)
    assert "K = 2; onnxruntime's pictures differ from PyTorch's by" in done.out
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["student.onnx"]
    runner, rng = session(tmp_path / "a/student.onnx"), generator("inputs")
    for batch in (1, 7):
        noise = torch.randn(batch, 16, 4, generator=rng)
        order = torch.stack([torch.randperm(16, generator=rng) for _ in range(batch)])
        labels = torch.arange(batch) % 2
        (images,) = runner.run(["images"], {"labels": labels.numpy(), "noise": noise.numpy(), "order": order.numpy()})
        draw = draw_function(config)
        start = prepare(model, draw, iterations=iterations, seeds=range(batch), orders=order, noise=noise[None])
        *_, (tokens, _) = run(model, draw, model.embed(labels), start)
        np.testing.assert_allclose(images, token_space(config.space).decode(tokens), atol=1e-4)
    about = runner.get_modelmeta().custom_metadata_map
    assert (about["iterations"], json.loads(about["class_names"])) == (str(iterations), ["cross", "square"])


def test_a_joint_draw_is_exported(tmp_path):
    model = tiny_model(joint_draw=True)
    assert export_onnx(model, dataclasses.replace(STUDENT, mar=model.config), 2, tmp_path / "student.onnx") < 1e-5


def test_latents_come_out_ready_for_the_vae():
    space = LatentSpace((32, 32), "none", vae_stride=8, latent_channels=4, scale=0.5, shift=0.25)
    tokens = torch.arange(16 * 4).reshape(1, 16, 4).float()
    config = dataclasses.replace(tiny_config(), space=space, draw=OneStep())
    latents = Student(tiny_model(), config, 1).picture(tokens)
    torch.testing.assert_close(latents, tokens.mT.reshape(1, 4, 4, 4) / 0.5 + 0.25)


def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "student.onnx"
    with pytest.raises(ValueError, match="tiny is a teacher, which calls its head 8 times for each token"):
        export_onnx(tiny_model(), tiny_config(), 4, file)
    with pytest.raises(ValueError, match="17 iterations for 16 tokens"):
        export_onnx(tiny_model(), STUDENT, 17, file)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match="pip install onnx onnxscript onnxruntime"):
        export_onnx(tiny_model(), STUDENT, 4, file)
    assert not list(tmp_path.iterdir())
