"""Figures of features against float64 references and known answers; ADM's reference by torch-fidelity's interface."""

import sys
import types

import numpy as np
import pytest
import torch

from marval.cli.arguments import judge_for
from marval.data import ImageData, load_fashion_mnist
from marval.evaluate import fidelity
from marval.evaluate.features import (
    EfficientNetFeatures,
    Statistics,
    bundled_statistics,
    extract,
    find_features,
    frechet_distance,
)
from marval.evaluate.judge import Judge, data_hash, judge_by_reference, load_judge
from marval.evaluate.metrics import expected_bias, kernel_distance, neighbour_figures
from marval.pipeline import Pipeline, load
from marval.randomness import generator
from tiny import tiny_config, tiny_data, tiny_model


def reference_kid(x, y):
    """The unbiased estimate of MMD^2 under (x.y / d + 1)^3, in numpy's float64."""
    n, m, d = len(x), len(y), x.shape[1]
    kernel = lambda a, b: (a @ b.T / d + 1) ** 3  # noqa: E731
    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    within = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return within - 2 * xy.mean()


def test_kid_equals_a_float64_reference():
    rng = np.random.default_rng(0)
    real, drawn = rng.normal(size=(120, 9)), 1.2 * rng.normal(size=(120, 9)) + 0.3
    found = kernel_distance(torch.from_numpy(drawn), torch.from_numpy(real), subsets=2, subset_size=120)
    assert found == pytest.approx(reference_kid(drawn, real), rel=1e-6)
    state = torch.get_rng_state()
    assert kernel_distance(torch.from_numpy(drawn), torch.from_numpy(real), subset_size=50) == pytest.approx(
        kernel_distance(torch.from_numpy(drawn), torch.from_numpy(real), subset_size=50), rel=1e-12
    )
    assert torch.equal(state, torch.get_rng_state())  # the global stream is left as it was


def test_precision_asks_whether_drawn_images_are_real_and_recall_whether_real_ones_are_drawn():
    rng = generator("two islands")
    here, there = torch.randn(40, 4, generator=rng), torch.randn(40, 4, generator=rng) + 100
    both, one = torch.cat([here, there]), torch.randn(60, 4, generator=rng) * 0.5
    lazy = neighbour_figures(one, both)  # draws one of the two kinds, and draws it well
    assert lazy["precision"] > 0.95
    assert lazy["recall"] <= 0.5
    assert lazy["coverage"] <= 0.5
    assert lazy["density"] > 1
    wild = neighbour_figures(both, one)  # half of what it draws is of no kind
    assert wild["precision"] <= 0.5
    assert wild["recall"] > 0.95
    same = neighbour_figures(both, both)
    assert same["precision"] == same["recall"] == same["coverage"] == 1.0


def test_neighbour_figures_equal_their_definitions_in_numpy():
    rng = np.random.default_rng(1)
    real, drawn = rng.normal(size=(1100, 3)), 0.8 * rng.normal(size=(70, 3)) + 0.2  # more rows than are done at a time
    between = np.linalg.norm(drawn[:, None] - real[None], axis=2)

    def radius(x, k):
        return np.sort(np.linalg.norm(x[:, None] - x[None], axis=2), axis=1)[:, k]

    expected = {
        "precision": (between <= radius(real, 3)).any(axis=1).mean(),
        "recall": (radius(drawn, 3) >= between.T).any(axis=1).mean(),
        "density": (between <= radius(real, 5)).sum() / 5 / len(drawn),
        "coverage": (between <= radius(real, 5)).any(axis=0).mean(),
    }
    assert neighbour_figures(torch.from_numpy(drawn), torch.from_numpy(real)) == pytest.approx(expected, abs=1e-9)
    with pytest.raises(ValueError, match="at least 6"):
        neighbour_figures(torch.from_numpy(drawn[:5]), torch.from_numpy(real))


def test_the_bias_of_few_images_is_foretold():
    """300 real images, whose true distance from the real set is 0, against what is said to expect of 300."""
    data = load_fashion_mnist("train")
    real = Statistics.load(bundled_statistics("fashion-mnist"))
    chosen = torch.randperm(len(data), generator=generator("some"))[:300]
    network = EfficientNetFeatures()
    measured = frechet_distance(extract(network, data.images[chosen]), real)
    assert expected_bias(real, 300) == pytest.approx(measured, rel=0.1)
    said, bias = Judge(network, real, None).warning(300)
    assert f"{bias:.4g}" in said
    assert "300 images are fewer than 1280 features" in said
    assert Judge(network, real, None).warning(1280) is None


@pytest.fixture
def own_features(tmp_path, monkeypatch):
    (tmp_path / "own_features.py").write_text(
        "import torch\n"
        "def rows(images): return images.float().mean(dim=(1, 3))\n"
        "class Columns(torch.nn.Module):\n"
        "    def forward(self, images): return images.float().mean(dim=(1, 2))\n"
        "def flat(images): return images.float().mean(dim=(1, 2, 3))\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path
    sys.modules.pop("own_features", None)


def test_own_features_judge_and_their_statistics_are_kept_apart(own_features):
    data = tiny_data()
    judge = load_judge("folder:x", None, lambda: data, features="own_features:rows", sample=40)
    figures = judge.figures(data.images, data.labels)
    assert figures["fd"] == pytest.approx(0, abs=1e-6)
    assert figures["coverage"] == 1.0
    assert len(judge.sample().features) == 40
    assert len(judge.data_sha256) == 64
    again = load_judge("folder:x", None, lambda: data, features="own_features:rows", sample=40)
    assert torch.equal(again.sample().radius, judge.sample().radius)
    other = load_judge("folder:x", None, lambda: data, features="own_features:Columns", sample=40)
    assert other.figures(data.images, data.labels)["fd"] == pytest.approx(0, abs=1e-6)
    assert len(list((own_features / "cache/marval").glob("statistics-*"))) == 2
    assert extract(find_features("own_features:rows"), data.images).shape == (64, 8)


def test_the_packaged_statistics_are_those_of_the_real_images(tmp_path, monkeypatch):
    """Their hash is the data's, and images that are not the data are never measured under it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = load_fashion_mnist("train")
    assert Statistics.load(bundled_statistics("fashion-mnist")).data_sha256 == data_hash(data)
    packaged = load_judge("fashion-mnist", None, lambda: data)
    copied = load_judge("fashion-mnist:elsewhere", None, lambda: data)  # the same images from another folder
    assert copied.data_sha256 == packaged.data_sha256
    assert torch.equal(copied.real.mean, packaged.real.mean)
    other = ImageData(data.images[:300].flip(3), data.labels[:300], data.class_names)
    with pytest.raises(ValueError, match="not those of marval's statistics"):
        load_judge("fashion-mnist", None, lambda: other, sample=10).sample()
    own = load_judge("fashion-mnist:other", None, lambda: other)
    assert own.data_sha256 == data_hash(other) != packaged.data_sha256
    assert own.figures(other.images, other.labels)["fd"] == pytest.approx(0, abs=1e-3)


def test_bundled_models_are_judged_without_reading_the_real_images(tmp_path, monkeypatch):
    """Fréchet distance and accuracy need none; what does says so when it is measured, once (then it is kept)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    read: list[str] = []
    data = load_fashion_mnist("train")

    def counted(spec, size=None):
        read.append(spec)
        return data

    monkeypatch.setattr("marval.data.load_images", counted)
    pipeline = load("fashion-student", "cpu")
    judge = judge_for(pipeline, None, None)
    found = judge.figures(data.images[:100], data.labels[:100])
    assert {"fd", "accuracy", "log_probability", "diversity"} == set(found)
    assert len(judge.data_sha256) == 64
    asked = judge_for(pipeline, None, None, sample=50)
    assert read == []
    assert {"kid", "precision", "recall", "density", "coverage"} <= set(
        asked.figures(data.images[:20], data.labels[:20])
    )
    assert read == ["fashion-mnist"]
    again = judge_for(pipeline, None, None, sample=50)
    assert torch.equal(again.sample().features, asked.sample().features)
    assert read == ["fashion-mnist"]
    with pytest.raises(ValueError, match="not the model's"):
        judge_for(Pipeline(tiny_model(), tiny_config()), "fashion-mnist", None)


def test_statistics_of_other_features_and_bad_features_are_refused(own_features):
    data = tiny_data()
    judge = load_judge("folder:x", None, lambda: data, features="own_features:rows")
    judge.real.save(own_features / "rows.safetensors")
    kept = judge_by_reference(own_features / "rows.safetensors", None, "own_features:rows", "cpu")
    assert kept.figures(data.images, data.labels)["fd"] == pytest.approx(0, abs=1e-4)  # kept in float32
    with pytest.raises(ValueError, match=r"own_features:rows .*expected 'EfficientNet-Lite0"):
        judge_by_reference(own_features / "rows.safetensors", None, None, "cpu")
    assert kept.data_sha256 == judge.data_sha256  # statistics say which images they are of
    for spec, words in (
        ("own_features", "expected package.module:function"), ("no_such_module:f", "cannot import"),
        ("own_features:number", "has no function"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            find_features(spec)
    with pytest.raises(ValueError, match=r"returned \(64,\), expected \(64, features\)"):
        extract(find_features("own_features:flat"), data.images)


class FakeInception(torch.nn.Module):
    """torch-fidelity's interface: 8 "pooled" features, 3 logits, and a branch with a 2 x 2 map of 192 channels."""

    def __init__(self, name, features_list):
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        self.Mixed_6d = torch.nn.Module()
        self.Mixed_6d.branch1x1 = torch.nn.Conv2d(3, 192, 4, 4, bias=False)
        torch.nn.init.normal_(self.Mixed_6d.branch1x1.weight, generator=generator("fake"))

    def forward(self, images):
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        maps = self.Mixed_6d.branch1x1(images.float() / 255)
        features = maps[:, :16:2].mean(dim=(2, 3))
        return features, features[:, :3]


@pytest.fixture
def fake_fidelity(monkeypatch):
    extractor, score = types.ModuleType("extractor"), types.ModuleType("score")
    extractor.FeatureExtractorInceptionV3 = FakeInception
    score.isc_features_to_metric = lambda logits, splits: {
        "inception_score_mean": float(len(logits)), "inception_score_std": float(splits)
    }  # fmt: skip
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", extractor)
    monkeypatch.setitem(sys.modules, "torch_fidelity.metric_isc", score)


def write_reference(file, images, **extra):
    """ADM's file for some images: statistics of the fake network's features."""
    pool, _, spatial = fidelity.Inception(torch.device("cpu")).of([images])
    arrays = {"mu": pool.mean(0).numpy(), "sigma": np.cov(pool.double().numpy(), rowvar=False)}
    arrays |= {"mu_s": spatial.mean(0).numpy(), "sigma_s": np.cov(spatial.double().numpy(), rowvar=False)}
    arrays["arr_0"] = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    np.savez(file, **{name: value for name, value in arrays.items() if name not in extra.get("without", ())})


def test_figures_against_adms_reference_file(fake_fidelity, tmp_path):
    data = tiny_data()
    write_reference(tmp_path / "adm.npz", data.images)
    judge = judge_by_reference(tmp_path / "adm.npz", None, None, "cpu")
    assert len(judge.data_sha256) == 64
    found = judge.figures_of([(data.images[:30], data.labels[:30]), (data.images[30:], data.labels[30:])])
    assert found["fid"] == pytest.approx(0, abs=1e-4)
    assert found["sfid"] == pytest.approx(0, abs=1e-3)
    assert found["inception_precision"] == found["inception_recall"] == 1.0
    assert (found["inception_score"], found["inception_score_std"]) == (64.0, 10.0)
    said, bias = judge.warning(4)
    assert "4 images are fewer than 8 features" in said
    assert bias > 0
    assert judge.warning(8) is None
    assert "fd" not in found  # no distance on other features is called FID
    crosses = data.images[data.labels == 0]
    lazy = fidelity.Reference.load(tmp_path / "adm.npz").figures([crosses], torch.device("cpu"))
    assert lazy["fid"] > 0.1
    assert lazy["inception_precision"] == 1.0
    assert lazy["inception_recall"] < 0.9
    write_reference(tmp_path / "mar.npz", data.images, without=("mu_s", "sigma_s", "arr_0"))
    short = fidelity.Reference.load(tmp_path / "mar.npz").figures([data.images], torch.device("cpu"))
    assert set(short) == {"fid", "inception_score", "inception_score_std"}


def test_spatial_features_have_tensorflows_order(fake_fidelity):
    inception = fidelity.Inception(torch.device("cpu"))
    images = tiny_data().images[:2]
    _, _, spatial = inception.of([images])
    maps = inception.network.Mixed_6d.branch1x1(images.expand(-1, 3, -1, -1).float() / 255)
    assert spatial.shape == (2, 2 * 2 * 7)
    torch.testing.assert_close(spatial[1, 7 * 3 : 7 * 4], maps[1, :7, 1, 1])


def test_bad_reference_files(tmp_path, fake_fidelity, monkeypatch):
    with pytest.raises(ValueError, match=r"openaipublic.*expected SHA-256 b32732719497.*records"):
        fidelity.Reference.load(tmp_path / "nowhere.npz")
    write_reference(tmp_path / fidelity.ADM_FILE, tiny_data().images)
    with pytest.raises(ValueError, match=r"has SHA-256 [0-9a-f]{64}, expected b32732719497.*fetch it again"):
        fidelity.Reference.load(tmp_path / fidelity.ADM_FILE)
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    with pytest.raises(ValueError, match="holds weights, expected mu and sigma"):
        fidelity.Reference.load(tmp_path / "other.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ValueError, match="cannot be read as ADM's reference"):
        fidelity.Reference.load(tmp_path / "text.npz")
    np.savez(tmp_path / "short.npz", mu=np.zeros(3), sigma=np.eye(3))
    reference = fidelity.Reference.load(tmp_path / "short.npz")
    with pytest.raises(ValueError, match="statistics of 3 features, expected Inception's 8"):
        reference.figures([tiny_data().images], torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ValueError, match=r"pip install 'marval\[fidelity\]'"):
        reference.figures([tiny_data().images], torch.device("cpu"))
