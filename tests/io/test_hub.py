"""Models on the Hugging Face hub: what is sent and asked for, and what is told when the hub does not answer."""

import dataclasses
import shutil
from types import SimpleNamespace
from unittest.mock import create_autospec

import huggingface_hub as hub
import pytest
import torch

import marval
from marval.config import LatentSpace, OneStep
from marval.io.hub import model_card, published
from marval.pipeline import Pipeline
from texts import text_config
from tiny import tiny_config, tiny_model

FILES, VAE = ["model.safetensors", "config.json"], "*/diffusion_pytorch_model.safetensors"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """The files of me/tiny, the one repository; the library's functions keep their signatures."""
    folder, calls = tmp_path / "repository", []

    def upload_folder(*, folder_path, **options):
        calls.append(options)
        shutil.copytree(folder_path, folder)

    def snapshot_download(repo_id, *, revision, allow_patterns):
        calls.append({"revision": revision, "patterns": allow_patterns})
        if repo_id != "me/tiny":
            raise hub.errors.LocalEntryNotFoundError("nothing on this disk.\n\nPlease check your connection.")
        return str(folder)

    def create_repo(repo_id, **options):
        calls.append({"create": repo_id, **options})
        return f"https://hub/{repo_id}"

    api = create_autospec(hub.HfApi, instance=True)
    api.create_repo.side_effect, api.upload_folder.side_effect = create_repo, upload_folder
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    monkeypatch.setattr(hub, "snapshot_download", create_autospec(hub.snapshot_download, side_effect=snapshot_download))
    return SimpleNamespace(folder=folder, calls=calls)


def test_a_model_is_pushed_with_its_card_and_loaded_from_there(repository):
    model = Pipeline(tiny_model(), tiny_config())
    address = model.push_to_hub("me/tiny", private=True, license="apache-2.0")
    assert address == "https://hub/me/tiny"
    assert repository.calls[0] == {"create": "me/tiny", "private": True, "exist_ok": True}
    assert {file.name for file in repository.folder.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    card = (repository.folder / "README.md").read_text()
    for part in ("library_name: marval", "license: apache-2.0", "- marval", 'marval.load("me/tiny")', "1 square"):
        assert part in card
    again = marval.load("me/tiny", revision="v1")
    assert repository.calls[-1] == {"revision": "v1", "patterns": [*FILES, "*/config.json", VAE]}
    assert torch.equal(model.sample(["cross"], seed=3), again.sample(["cross"], seed=3))


def test_what_the_hub_does_not_give_is_told_in_one_line(repository):
    with pytest.raises(
        ValueError,
        match=r"no model 'me/other': .*did not give me/other: .*: nothing on this disk. Please check your connection.$",
    ):
        marval.load("me/other")
    repository.folder.mkdir()
    (repository.folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model.safetensors does not exist"):
        marval.load("me/tiny")


def test_paths_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Pipeline(tiny_model(), tiny_config()).save(tmp_path / "runs/student")
    assert marval.load("runs/student").config == tiny_config()
    with pytest.raises(ValueError, match=r"no model 'runs/other': expected a folder, or a bundled model [\w, -]+$"):
        marval.load("runs/other")  # runs/ is here, so this is no hub id


def test_a_card_names_neither_a_licence_that_nobody_chose_nor_a_folder_of_this_machine():
    space = LatentSpace((256, 256), "/home/someone/models/kl16", vae_sha256="0123abcd")
    mar = dataclasses.replace(tiny_config().mar, token_grid=space.token_grid, token_dim=space.token_dim)
    card = model_card("me/tiny", published(dataclasses.replace(tiny_config(), mar=mar, space=space, draw=OneStep())))
    assert "license" not in card
    assert "needs the VAE `kl16` (SHA-256 `0123abcd`)" in card
    assert "/home/" not in card
    text = dataclasses.replace(text_config(), encoder="/home/someone/encoder")
    card = model_card("me/words", published(text))
    assert all(part in card for part in ("- text-to-image", ".sample(['shark'], seed=0)", "Styles: 3d, flat."))
    assert "/home/" not in card
