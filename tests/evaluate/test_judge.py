"""What images are judged by: statistics of real images, classifiers, ADM's reference by torch-fidelity."""

import hashlib
import math
import sys
import types
import urllib.error

import numpy as np
import pytest
import torch

from marval.data import ImageData, load_fashion_sample
from marval.evaluate import fidelity
from marval.evaluate.features import (
    EfficientNetFeatures,
    Statistics,
    find_features,
)
from marval.evaluate.judge import Judge, data_hash, make_judge, measure_data
from marval.pipeline import Pipeline, load
from marval.rewards import ClassifierReward, prompts_of
from marval.rewards.classifier import Classifier, load_classifier, save_classifier
from marval.runtime.rng import generator
from tiny import tiny_config, tiny_data, tiny_model
from workspace import FEATURES


def load_judge(data, images, features=None, sample=0):
    network = find_features(features)
    real, some = measure_data(network, data, images, sample)
    return Judge(network, real, None, some)


def test_statistics_come_back_from_disk(tmp_path):
    features = torch.randn(200, 8, generator=generator("features"))
    statistics = Statistics.of([features])
    np.testing.assert_allclose(statistics.covariance, np.cov(features.double().numpy(), rowvar=False), rtol=1e-9)
    statistics.save(tmp_path / "s.safetensors")
    again = Statistics.load(tmp_path / "s.safetensors")
    torch.testing.assert_close(again.covariance, statistics.covariance, rtol=1e-6, atol=1e-7)


class Sure(Classifier):
    """Takes an image's brightness for its class, by log-odds of 2."""

    def forward(self, images):
        return torch.nn.functional.one_hot((images[:, 0, 0, 0] * 255).round().long(), 3).float() * 2


def test_accuracy_and_log_probability_have_known_answers():
    """600 images, more than are classified at a time: two in three are what they are called."""
    labels = torch.arange(600) % 3
    images = torch.where(labels == 2, 0, labels).byte()[:, None, None, None].expand(-1, 1, 8, 8)
    judge = Judge(EfficientNetFeatures(), None, Sure("plain", 1, ("a", "b", "c")))
    columns, found = judge.columns(images, labels), judge.figures(images, labels)
    assert columns["accuracy"].tolist() == [1.0, 1.0, 0.0] * 200
    right, wrong = 2 - math.log(math.e**2 + 2), -math.log(math.e**2 + 2)
    assert columns["log_probability"].tolist() == pytest.approx([right, right, wrong] * 200)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["log_probability"] == pytest.approx((2 * right + wrong) / 3)


def test_a_classifier_comes_back_from_disk_and_rewards_the_class_in_the_prompt(tmp_path):
    images = torch.rand(3, 1, 28, 28, generator=generator("images"), requires_grad=True)
    for architecture in ("plain", "residual"):
        classifier = Classifier(architecture, 1, ("shirt", "t-shirt", "bag")).eval()
        save_classifier(tmp_path / "c.safetensors", classifier, {})
        reward = ClassifierReward(load_classifier(tmp_path / "c.safetensors"))
        values = reward(images, prompts_of("a picture of {}", classifier.class_names, [1, 0, 2]))
        assert torch.equal(values, classifier(images).log_softmax(dim=1)[[0, 1, 2], [1, 0, 2]])
    values.sum().backward()
    assert (images.grad != 0).any(dim=(1, 2, 3)).all()


def test_own_features_judge_and_what_is_cached_of_them_is_made_again_where_it_is_damaged(workspace):
    data = tiny_data()
    judge = load_judge("folder:x", lambda: data, features=FEATURES, sample=40)
    figures, kernel = judge.figures(data.images, data.labels), float(judge.sample.kernel)
    assert figures["fd"] == pytest.approx(0, abs=1e-6)
    assert figures["own_recall"] == 1.0
    assert len(judge.sample.features) == 40
    files = list((workspace / "cache/marval").iterdir())
    assert len(files) == 2
    for file in files:
        file.write_bytes(file.read_bytes()[:20])
    again = load_judge("folder:x", lambda: data, features=FEATURES, sample=40)
    assert again.sample.kernel == kernel
    assert again.figures(data.images, data.labels) == pytest.approx(figures, abs=1e-6)
    (workspace / "plain_features.py").write_text("def rows(images): return images.float().mean(dim=(1, 2))")
    load_judge("folder:x", lambda: data, features=f"{workspace}/plain_features.py:rows")
    assert len(list((workspace / "cache/marval").glob("statistics-*"))) == 2  # of other code


def test_the_packaged_statistics_are_those_of_the_real_images(fashion_train, tmp_path, monkeypatch):
    """Their hash is the data's, wherever these lie; other images have their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = fashion_train
    packaged = load_judge("fashion-mnist", lambda: data)
    copied = load_judge("fashion-mnist:elsewhere", lambda: data)
    assert copied.about["data_sha256"] == packaged.about["data_sha256"] == data_hash(data)
    assert torch.equal(copied.real.mean, packaged.real.mean)
    other = ImageData(data.images[:300].flip(3), data.labels[:300], data.class_names)
    own = load_judge("fashion-mnist:other", lambda: other)
    assert own.about["data_sha256"] == data_hash(other) != packaged.about["data_sha256"]
    assert own.figures(other.images, other.labels)["fd"] == pytest.approx(0, abs=1e-3)


def test_bundled_models_are_judged_without_reading_the_real_images(tmp_path, monkeypatch):
    """Fréchet distance and accuracy need none; what does has them read once (then their features are kept)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    read, data = [], load_fashion_sample()

    def counted(spec, **_):
        read.append(spec)
        return data

    monkeypatch.setattr("marval.evaluate.judge.load_images", counted)
    pipeline = load("fashion-student", "cpu")
    found = make_judge(pipeline).figures(data.images[:100], data.labels[:100])
    assert {"fd", "accuracy", "log_probability", "diversity"} == set(found)
    assert read == []
    judge, again = (make_judge(pipeline, sample=50) for _ in range(2))
    names = ("kid", "precision", "recall")
    found = judge.figures(data.images[:20], data.labels[:20])
    assert {f"efficientnet_{name}" for name in names} <= set(found)
    assert set(names).isdisjoint(found)  # no figure on other features has the published one's name
    assert torch.equal(again.sample.features, judge.sample.features)
    assert read == ["fashion-mnist"]
    with pytest.raises(ValueError, match="not the model's"):
        make_judge(Pipeline(tiny_model(), tiny_config()), "fashion-mnist")


class FakeInception(torch.nn.Module):
    """torch-fidelity's interface: 8 "pooled" features, 3 logits, and a branch with a 2 x 2 map of 192 channels."""

    def __init__(self, name, features_list):
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        self.Mixed_6d = torch.nn.Module()
        self.Mixed_6d.branch1x1 = torch.nn.Conv2d(3, 192, 4, 4, bias=False)
        torch.nn.init.normal_(self.Mixed_6d.branch1x1.weight, generator=generator("fake"))
        self.fc = torch.nn.Linear(8, 3)

    def forward(self, images):
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        resized = torch.nn.functional.interpolate(images.float() / 255, (8, 8))  # as the real one, to one size
        maps = self.Mixed_6d.branch1x1(resized)
        features = maps[:, :16:2].mean(dim=(2, 3))
        return features, self.fc(features)


@pytest.fixture
def fake_fidelity(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/inception.pth").write_bytes(b"weights")
    extractor, score = types.ModuleType("extractor"), types.ModuleType("score")
    extractor.FeatureExtractorInceptionV3 = FakeInception
    extractor.URL_INCEPTION_V3 = "https://nowhere/inception.pth"
    score.isc_features_to_metric = lambda logits, splits: {
        "inception_score_mean": float(len(logits)), "inception_score_std": float(splits)
    }  # fmt: skip
    package = types.ModuleType("torch_fidelity")
    package.feature_extractor_inceptionv3 = extractor
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", extractor)
    monkeypatch.setitem(sys.modules, "torch_fidelity.metric_isc", score)


def write_reference(file, images, **extra):
    """ADM's file for some images: statistics of the fake network's features."""
    columns = fidelity.Inception("cpu").columns(images)
    pool, spatial = columns["pool"], columns["spatial"]
    arrays = {"mu": pool.mean(0).numpy(), "sigma": np.cov(pool.double().numpy(), rowvar=False)}
    arrays |= {"mu_s": spatial.mean(0).numpy(), "sigma_s": np.cov(spatial.double().numpy(), rowvar=False)}
    arrays["arr_0"] = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    np.savez(file, **{name: value for name, value in arrays.items() if name not in extra.get("without", ())})


def reference_figures(file, images):
    reference = fidelity.Reference.load(file, "cpu")
    return reference.figures(reference.inception.columns(images))


def test_figures_against_adms_reference_file(fake_fidelity, tmp_path):
    data = tiny_data()
    write_reference(tmp_path / "adm.npz", data.images)
    judge = make_judge(Pipeline(tiny_model(), tiny_config()), reference=tmp_path / "adm.npz")
    assert judge.about["reference"] == "adm.npz"
    assert judge.about["inception_sha256"] == hashlib.sha256(b"weights").hexdigest()
    found = judge.figures(data.images, data.labels)
    assert found["fid"] == pytest.approx(0, abs=1e-4)
    assert found["sfid"] == pytest.approx(0, abs=1e-3)
    assert found["inception_precision"] == found["inception_recall"] == 1.0
    assert found["inception_kid"] <= 0  # of the same images: pairs of an image with itself are left out on each side
    assert (found["inception_score"], found["inception_score_std"]) == (64.0, 10.0)
    assert "fd" not in found  # no distance on other features is called FID
    lazy = reference_figures(tmp_path / "adm.npz", data.images[data.labels == 0])
    assert lazy["fid"] > 0.1
    assert lazy["inception_precision"] == 1.0
    assert lazy["inception_recall"] < 0.9
    write_reference(tmp_path / "mar.npz", data.images, without=("mu_s", "sigma_s", "arr_0"))
    short = reference_figures(tmp_path / "mar.npz", data.images)
    assert set(short) == {"fid", "inception_score", "inception_score_std"}
    inception, images = judge.reference.inception, data.images[:2]
    spatial = inception.columns(images)["spatial"]  # in TensorFlow's order
    maps = inception.network.Mixed_6d.branch1x1(images.expand(-1, 3, -1, -1).float() / 255)
    assert spatial.shape == (2, 2 * 2 * 7)
    torch.testing.assert_close(spatial[1, 7 * 3 : 7 * 4], maps[1, :7, 1, 1])


def test_bad_reference_files(tmp_path, fake_fidelity, monkeypatch):
    """All of them are refused as the file is read, before anything is drawn."""

    def refused(name, words):
        with pytest.raises(ValueError, match=words):
            fidelity.Reference.load(tmp_path / name, "cpu")

    refused("nowhere.npz", r"openaipublic.*expected SHA-256 b32732719497.*records")
    for name in (fidelity.ADM_FILE, "cut.npz"):
        write_reference(tmp_path / name, tiny_data().images)
    refused(fidelity.ADM_FILE, r"has SHA-256 [0-9a-f]{64}, expected b32732719497.*fetch it again")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:-500])  # half fetched
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    for name in ("cut.npz", "text.npz", "other.npz"):
        refused(name, rf"{name} cannot be read as ADM's reference")
    np.savez(tmp_path / "short.npz", mu=np.zeros(3), sigma=np.eye(3))
    refused("short.npz", r"mu has shape \(3,\), not the network's")

    def unreachable(*_):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3", unreachable)
    refused("short.npz", r"no network.*put https://nowhere/inception.pth at .*checkpoints/inception.pth")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    refused("short.npz", "pip install torch-fidelity")
