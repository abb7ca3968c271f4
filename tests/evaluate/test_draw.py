"""An evaluation's images: the same set on any number of processes, whole after a kill, and in ADM's format."""

import hashlib
import signal
import subprocess
import time

import numpy as np
import pytest
import torch

from marval.evaluate.draw import SHARD, Drawing, claim_folder, draw_bytes, draw_shards, write_npz
from marval.pipeline import Pipeline
from marval.runtime.distributed import Workers
from processes import command, environment, launch
from tiny import tiny_config, tiny_model

SCRIPT = "images_run.py"
COUNT = 18  # four shards of 4 and one of 2


def contents(folder):
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix != ".npz"
    }  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images") / "alone"
    launch(SCRIPT, 1, folder, COUNT, timeout=120)
    return folder


def test_a_killed_run_keeps_its_shards_and_ends_on_three_processes_as_on_one(alone, tmp_path):
    folder = tmp_path / "killed"
    process = subprocess.Popen(command(SCRIPT, 1, folder, COUNT, 0.5), env=environment(), stderr=subprocess.DEVNULL)
    while len(list(folder.glob("shard-*"))) < 2 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {file: file.stat().st_mtime_ns for file in folder.glob("shard-*")}
    assert 2 <= len(kept) < 5
    launch(SCRIPT, 3, folder, COUNT, timeout=120)
    assert contents(folder) == contents(alone)
    assert all(file.stat().st_mtime_ns == when for file, when in kept.items())  # none was drawn again


def test_images_are_balanced_seeded_one_by_one_and_written_in_adms_format(alone):
    pipeline = Pipeline(tiny_model(), tiny_config())
    drawing = Drawing(pipeline, COUNT, 3, 2, folder=alone, shard=4)
    images, labels = (torch.cat(parts) for parts in list(zip(*draw_shards(drawing), strict=True))[1:])
    assert labels.tolist() == [0, 1] * 9
    in_memory, same_labels = draw_bytes(pipeline, COUNT, 3, seed=2)
    assert torch.equal(images, in_memory)
    assert torch.equal(labels, same_labels)
    eleventh = pipeline.sample([1], seed=2_000_011, iterations=3)
    assert torch.equal((eleventh * 255).round().byte()[0], images[11])
    with np.load(alone / "images.npz") as archive:
        array = archive["arr_0"]
        assert (archive["arr_1"] == labels.numpy()).all()
    assert array.shape == (COUNT, 8, 8, 3)
    assert array.dtype == np.uint8
    assert (array == images.permute(0, 2, 3, 1).numpy()).all()
    (alone / ".images.npz.killed").write_text("half of one")  # what a kill leaves
    before = (alone / "images.npz").stat().st_mtime_ns
    assert write_npz(drawing, alone).stat().st_mtime_ns == before  # a whole one is kept
    (alone / "images.npz").unlink()
    write_npz(drawing, alone)
    assert not list(alone.glob(".images*"))


def test_another_models_images_and_damaged_shards_are_refused(tmp_path):
    def draw(sha256):
        pipeline = Pipeline(tiny_model(), tiny_config())
        drawing = Drawing(pipeline, 6, 2, folder=tmp_path / "a", key={"sha256": sha256}, shard=4)
        claim_folder(drawing, Workers())
        return [len(images) for _, images, _ in draw_shards(drawing)]

    assert draw("one") == [4, 2]
    with pytest.raises(ValueError, match="holds images of sha256 'one', expected 'two': choose another --keep-images"):
        draw("two")
    file = tmp_path / "a/shard-00001.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"damaged .* remove it and run the same command again"):
        draw("one")
    file.unlink()
    assert draw("one") == [4, 2]


def test_scores_are_in_the_images_order_on_any_number_of_processes(tmp_path):
    """Three shards on two processes; two of them gone, on one; some images drawn and some read."""
    count = 2 * SHARD + 7
    expected, labels = draw_bytes(Pipeline(tiny_model(), tiny_config()), count, 2, seed=3)
    for processes in (2, 1):
        launch("columns_run.py", processes, count, tmp_path / "drawn", tmp_path / "columns.pt", timeout=120)
        found = torch.load(tmp_path / "columns.pt")
        assert torch.equal(found["images"], expected)
        assert torch.equal(found["labels"], labels)
        files = sorted(tmp_path.glob("drawn/*/shard-*"))
        assert len(files) == 3
        for file in files[:2]:
            file.unlink()
