"""Files: whole or not at all, strict, and the data sets that people have."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from marval.config import Chain, LatentSpace, MARConfig, ModelConfig, OneStep
from marval.data import load_folder, load_images
from marval.io.checkpoint import load_model, save_model
from marval.io.files import atomic_path
from marval.io.images import grid, to_pil
from tiny import tiny_config, tiny_model


@pytest.fixture
def tiny():
    return tiny_model(), dataclasses.replace(tiny_config(), draw=OneStep())


@pytest.mark.parametrize("draw", [OneStep(), Chain(guidance=2.0, diffusion_steps=50)])
def test_a_model_comes_back_as_it_was(draw, tiny, tmp_path):
    model, config = tiny[0], dataclasses.replace(tiny[1], draw=draw)
    save_model(tmp_path, model, config)
    again, read = load_model(tmp_path)
    assert read == config
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(json.dumps(config.to_dict()))
    (tmp_path / "config.json").unlink()
    assert load_model(tmp_path / "model.safetensors")[1] == config  # the weights' file alone is a whole model


def test_half_precision_on_disk_is_float32_in_memory(tiny, tmp_path):
    model, config = tiny
    save_model(tmp_path, model, config, torch.float16)
    again, _ = load_model(tmp_path)
    assert {value.dtype for value in again.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(
        again.state_dict()["z_proj.weight"], model.state_dict()["z_proj.weight"], rtol=1e-3, atol=1e-6
    )


def test_tensors_that_do_not_fit_are_named(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    model, config = tiny
    save_model(tmp_path, model, config)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    metadata = {"marval": json.dumps(config.to_dict())}
    for change, message in (
        (lambda t: t.pop("mask_token"), "mask_token is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "unknown tensor extra"),
        (lambda t: t.update({"z_proj.bias": torch.zeros(3)}), r"z_proj.bias has shape \(3,\), expected \(16,\)"),
    ):
        changed = dict(tensors)
        change(changed)
        save_file(changed, file, metadata=metadata)
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path)
    save_file(tensors, file, metadata={"marval": '{"mar": {}}'})
    with pytest.raises(ValueError, match="configuration"):
        load_model(tmp_path)


def test_latent_spaces_survive_json():
    space = LatentSpace((256, 256), "some/vae")
    assert space.token_grid == (16, 16)
    assert space.token_dim == 16
    changed = ModelConfig(MARConfig.imagenet256("base"), space, Chain(), tuple(map(str, range(1000))), 64)
    assert ModelConfig.from_dict(json.loads(json.dumps(changed.to_dict()))) == changed
    assert ModelConfig.from_dict(json.loads(json.dumps(tiny_config().to_dict()))) == tiny_config()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("old")

    def fails():
        with atomic_path(file) as partial:
            partial.write_text("new, but not all of i")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_folders_give_size_channels_and_classes(tmp_path):
    for name, shape in (("b", (30, 40)), ("a", (30, 40))):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full(shape, 200, np.uint8)).save(tmp_path / name / "x.png")
    data = load_folder(tmp_path)
    assert data.images.shape == (2, 1, 30, 40)
    assert data.class_names == ("a", "b")
    assert data.labels.tolist() == [0, 1]
    Image.fromarray(np.zeros((100, 90, 3), np.uint8)).save(tmp_path / "a" / "y.jpg")
    data = load_folder(tmp_path)
    assert data.images.shape == (3, 3, 30, 40)  # a colour image makes all RGB; one of another shape is cropped
    assert load_images(f"folder:{tmp_path}", size=(16, 16)).images.shape == (3, 3, 16, 16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images in empty"):
        load_folder(tmp_path)
    with pytest.raises(ValueError, match="unknown data"):
        load_images("cifar")


def test_pictures_round_and_grids_hold_every_image():
    image = torch.tensor([[[0.0, 0.5], [1.0, 0.998]]])
    assert np.asarray(to_pil(image)).tolist() == [[0, 128], [255, 255 - 1]] or np.asarray(to_pil(image))[1, 1] == 254
    picture = grid([image.expand(3, 1, 2, 2)] * 2, ["one", "two"], ["a", "b", "c"], "title", scale=10)
    values = np.asarray(picture.convert("L"))
    assert (values == 0).sum() >= 6 * 100
    assert picture.width > 3 * 20
