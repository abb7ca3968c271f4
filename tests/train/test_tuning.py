"""Tuning from the command line and its parts: judges, anchors, guidance, precision, and what is said when it starts."""

import dataclasses
import json
import math
import string
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from marval.cli import main
from marval.config import LatentSpace, MARConfig, OneStep
from marval.io.checkpoint import add_guidance, load_model, save_model
from marval.model import MAR
from marval.pipeline import Pipeline, load
from marval.presets import DistillConfig, TrainConfig, TuneConfig
from marval.rewards import ClassifierReward, Prompt, prompts_of
from marval.rewards.classifier import Classifier
from marval.runtime.folder import open_run
from marval.runtime.optim import decayed
from marval.runtime.rng import generator
from marval.sampling import DrawInOneStep, draw_counts, guidance_at, sample
from marval.train import tune as finetune_module
from marval.train.anchor import anchor_settings
from marval.train.distill import distill, revealed_after
from marval.train.keeper import Keeper
from tiny import tiny_config, tiny_data, tiny_model

BRIGHT = "def score(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n"


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run marval in this process, in a folder of its own; what it printed, or the line it refused with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache-home"))

    def run(*arguments, refused=False):
        monkeypatch.setattr(sys, "argv", ["marval", *map(str, arguments)])
        if refused:
            with pytest.raises(SystemExit) as caught:
                main()
            assert caught.value.code == 2
            (line,) = capsys.readouterr().err.strip().splitlines()
            return line
        main()
        return capsys.readouterr().out

    return run


def write_pictures(root, classes, each, side=8):
    rng = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(each):
            picture = Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8))
            picture.save(root / name / f"{i}.png")


def student_of(classes, **changes):
    """A tiny student of RGB pictures of 8x8 pixels, in these classes."""
    config = tiny_config()
    space = dataclasses.replace(config.space, channels=3)
    mar = dataclasses.replace(config.mar, num_classes=len(classes), token_dim=space.token_dim)
    model = MAR(mar).initialize(generator(0, "tiny")).eval().requires_grad_(False)
    config = dataclasses.replace(
        config, mar=mar, space=space, class_names=tuple(classes), draw=OneStep(), data="folder:pictures", name="student"
    )
    return Pipeline(model, dataclasses.replace(config, **changes))


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# --- the reward of the class that was asked for ---


@pytest.mark.parametrize("template", ["a high-quality and harmonious picture of {}", "{}", "no class", "car: {}"])
@pytest.mark.parametrize("names", [tuple(string.ascii_lowercase), ("car", "picture"), ("shirt", "t-shirt", "a {} b")])
def test_the_classifier_judges_the_class_that_was_asked_for(names, template):
    classifier = Classifier("plain", 1, names).eval()
    images = torch.rand(len(names), 1, 28, 28, generator=generator("images"))
    labels = list(reversed(range(len(names))))
    found = ClassifierReward(classifier)(images, prompts_of(template, names, labels))
    expected = classifier(images).log_softmax(dim=1)[torch.arange(len(names)), labels]
    torch.testing.assert_close(found, expected)


def test_a_prompt_without_a_class_and_an_unknown_class_are_refused():
    reward = ClassifierReward(Classifier("plain", 1, ("car", "dog")))
    with pytest.raises(ValueError, match=r"'a car' was made for no class"):
        reward(torch.zeros(1, 1, 28, 28), ["a car"])
    with pytest.raises(ValueError, match=r"does not know 'cat': it tells car, dog apart; .* --classifier FILE"):
        reward(torch.zeros(1, 1, 28, 28), [Prompt.of("a {}", "cat")])


def test_a_prompt_is_a_text_that_knows_its_class():
    prompt = Prompt.of("a picture of {}, or {}", "a {x} b")
    assert prompt == "a picture of a {x} b, or a {x} b"
    assert prompt.class_name == "a {x} b"
    for template in ("{x}", "a {class}", "{0} {}"):
        with pytest.raises(ValueError, match="no other braces"):
            Prompt.of(template, "bag")


# --- how many images, and which figures there are ---


def test_tuning_starts_where_there_are_as_many_classes_as_probe_images(command, tmp_path):
    classes = ("four", "one", "three", "two")
    write_pictures(tmp_path / "pictures", classes, 3)
    student_of(classes).save(tmp_path / "student")
    (tmp_path / "mine.py").write_text(BRIGHT)
    settings = ["--updates", 2, "--probe-every", 1, "--batch-size", 4, "--reward", "mine:score"]
    shown = command("tune", "student", *settings, "--probe-samples", 4, "--out", "a")
    assert "no class has two" in shown
    assert "--probe-samples 8" in shown
    assert "no held-out classifier" in shown
    assert [line["update"] for line in log_of(tmp_path / "a")] == [0, 1, 2]
    assert all("fd" in line and "diversity" not in line for line in log_of(tmp_path / "a"))
    assert "learning rate" not in shown
    shown = command("tune", "student", *settings, "--probe-samples", 6, "--out", "b")
    assert "the mean over the 2 classes that have two" in shown
    assert all(line["diversity_classes"] == 2 and line["diversity"] > 0 for line in log_of(tmp_path / "b"))
    shown = command("tune", "student", *settings, "--probe-samples", 8, "--out", "c")
    assert "diversity is the mean" not in shown
    assert all("diversity_classes" not in line and line["diversity"] > 0 for line in log_of(tmp_path / "c"))
    assert "--probe-samples 1: expected a whole number from 2" in command(
        "tune", "student", *settings, "--probe-samples", 1, "--out", "d", refused=True
    )


def test_tuning_works_with_one_class_and_ten_images(command, tmp_path):
    write_pictures(tmp_path / "pictures", ["only"], 10)
    student_of(["only"]).save(tmp_path / "student")
    (tmp_path / "mine.py").write_text(BRIGHT)
    shown = command(
        "tune", "student", "--updates", 1, "--probe-samples", 4, "--batch-size", 2, "--reward", "mine:score"
    )
    assert "1 of 1 updates done" in shown
    assert log_of(tmp_path / "runs/tuned")[0]["diversity"] > 0


def test_by_default_every_class_has_two_probe_images(command, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("marval.evaluate.probe.probe", lambda judge, samples, *a, **k: asked.append(samples))
    monkeypatch.setattr("marval.train.tune.tune", lambda *a, **k: "done")
    judge = type("Judge", (), {"classifier": None})()
    monkeypatch.setattr("marval.evaluate.inputs.training_judge", lambda *a: judge)
    (tmp_path / "mine.py").write_text(BRIGHT)
    for count in (3, 1000):
        student_of([f"class {i}" for i in range(count)]).save(tmp_path / "student")
        command("tune", "student", "--reward", "mine:score")
    assert asked == [1000, 2000]


def test_the_stop_uses_the_figures_that_there_are():
    settings = TuneConfig(patience=2)

    def ended(*figures):
        keeper = Keeper(settings)
        best = [keeper.see(one) for one in figures]
        return best, keeper.stopped

    assert ended({"fd": 1.0}, {"fd": 1.05}, {"fd": 1.0}) == ([True, True, True], "")
    assert ended({"fd": 1.0}, {"fd": 1.2})[1].startswith("the Fréchet distance rose to 1.20")
    assert ended({"fd": 1.0, "diversity": 2.0}, {"fd": 1.0, "diversity": 1.0})[1].startswith("the diversity fell")
    best, why = ended(*({"fd": 1.0, "held_out": x, "log_probability": -x} for x in (0.1, 0.3, 0.2, 0.2)))
    assert best == [True, True, False, False]  # by the held-out reward, though the classifier disagrees
    assert "held-out reward did not rise in 2 probes" in why


# --- guidance: recorded, and what the anchor pulls to ---


def test_a_student_records_the_guidance_that_it_was_distilled_with(tmp_path):
    settings = DistillConfig(updates=2, warmup=1, batch_size=4, tokens_per_image=4, guidance=1.7, autocast=False)
    config = tiny_config()
    with open_run(tmp_path / "run") as run:
        distill(tiny_model(), config, settings, tiny_data(), run)
    assert load(tmp_path / "run").config.draw == OneStep(755, True, 1.7, config.draw.guidance_schedule)
    own = dataclasses.replace(settings, guidance=None)
    with open_run(tmp_path / "own") as run:
        distill(tiny_model(), config, own, tiny_data(), run)
    assert load(tmp_path / "own").config.draw.guidance == config.draw.guidance == 1.5


@pytest.mark.parametrize("name", ["fashion-student", "fashion-tuned"])
def test_bundled_students_record_it_too(name):
    draw = load(name).config.draw
    assert (draw.guidance, draw.guidance_schedule) == (1.6, "linear")  # the mean of 1.5, 1.8 and 1.5: see the card


def test_older_students_load_and_their_config_json_may_say_it(tmp_path):
    config = dataclasses.replace(tiny_config(), draw=OneStep(guidance=1.2, guidance_schedule="linear"))
    older = config.to_dict()
    del older["draw"]["guidance"], older["draw"]["guidance_schedule"]
    file = tmp_path / "model.safetensors"
    assert add_guidance(older, file) == older  # nothing beside it
    save_model(tmp_path, tiny_model(), config)
    assert add_guidance(older, file)["draw"] == config.to_dict()["draw"]
    (tmp_path / "config.json").write_text('{"draw": {"guidance": 9, "guidance_schedule": "constant"}}')
    assert load_model(tmp_path)[1] == config  # weights that say it themselves are believed
    (tmp_path / "config.json").write_text("nonsense")
    assert add_guidance(older, file) == older
    with pytest.raises(ValueError, match="guidance -1"):
        OneStep(guidance=-1.0)


def test_an_anchor_pulls_to_what_was_distilled_by_the_recipe_of_the_preset():
    student = dataclasses.replace(tiny_config(), draw=OneStep(guidance=1.2, guidance_schedule="constant"), iterations=5)
    tuning = TuneConfig(batch_size=6, accumulate=2, autocast=False, seed=3)
    recipe = DistillConfig.imagenet256("base")
    found = anchor_settings(recipe, student, tuning)
    assert (found.guidance, found.guidance_schedule, found.iterations) == (1.2, "constant", 5)
    assert (found.batch_size, found.accumulate, found.autocast, found.seed) == (6, 2, False, 3)
    for name in ("tokens_per_image", "mask_ratio_min", "mask_ratio_std", "objective", "auxiliary_learning_rate"):
        assert getattr(found, name) == getattr(recipe, name)
    with pytest.raises(ValueError, match="distil it first"):
        anchor_settings(recipe, tiny_config(), tuning)


@pytest.mark.parametrize("iterations", [4, 16])
@pytest.mark.parametrize("tokens", [49, 256])
def test_the_mean_guidance_of_distillation_is_the_samplers(tokens, iterations):
    """Over the tokens of an image, w = 3, linear: K = 4 gives 2.3, where counting before the draw gave 1.7."""
    shown = sampled = distilled = 0
    for count in draw_counts(tokens, iterations):
        after = min(shown + count, tokens - 1) / tokens
        sampled += guidance_at(3.0, "linear", after) * count / tokens
        distilled += guidance_at(3.0, "linear", revealed_after(shown, tokens, iterations)) * count / tokens
        shown += count
    assert distilled == pytest.approx(sampled, rel=0.01)
    assert sampled == pytest.approx({4: 2.3, 16: 2.08}[iterations], abs=0.02)


# --- full size, on a tiny latent model ---


def test_a_latent_student_is_tuned_as_the_readme_describes(command, tmp_path):
    """Latents for the anchor, pictures for the judge, 30 classes, no classifier, a reward that is only watched."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 4), norm_num_groups=2, layers_per_block=1, latent_channels=2, sample_size=16,
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    classes = [f"class-{i:02d}" for i in range(30)]
    write_pictures(tmp_path / "pictures", classes, 2, side=20)
    command("cache", "cache", "--images", "pictures", "--vae", "vae", "--image-size", 16, "--scale", 0.2325)
    space = LatentSpace((16, 16), str(tmp_path / "vae"), vae_stride=4, latent_channels=2)
    mar = MARConfig(space.token_grid, 2, 30, 16, 1, 2, 16, 2, 2, 16, 2, buffer_size=2)
    draw = dataclasses.replace(tiny_config().draw, guidance=3.0, clip=False)
    named = {"class_names": tuple(classes), "data": "latents:cache", "name": "teacher"}
    config = dataclasses.replace(tiny_config(), mar=mar, space=space, draw=draw, **named)
    Pipeline(MAR(mar).initialize(generator(0)).eval(), config).save(tmp_path / "teacher")
    (tmp_path / "mine.py").write_text(BRIGHT + "def dark(images, prompts):\n    return -score(images, prompts)\n")

    recipe = ["--preset", "imagenet256-base", "--data", "latents:cache", "--batch-size", 4, "--log-every", 1]
    recipe += ["--iterations", 4, "--probe-samples", 60, "--probe-every", 3, "--updates", 3]
    assert "--judge-data folder:DIR" in command("distill", "teacher", *recipe, "--warmup", 1, refused=True)
    command("distill", "teacher", *recipe, "--warmup", 1, "--judge-data", "folder:pictures", "--out", "student")
    draw = load(tmp_path / "student").config.draw
    assert (draw.guidance, draw.guidance_schedule) == (1.2, "constant")  # the preset's, not the teacher's 3
    assert log_of(tmp_path / "student")[-1]["fd"] > 0

    tuning = [*recipe, "--reward", "mine.py:score", "--gradient-iterations", 2, "--anchor-warmup", 1]
    tuning += ["--anchor", 0.5, "--teacher", "teacher", "--out", "tuned"]
    assert "--judge-data folder:DIR" in command("tune", "student", *tuning, refused=True)
    shown = command("tune", "student", *tuning, "--judge-data", "folder:pictures", "--held-out", "mine.py:dark")
    assert "w = 1.2, constant" in shown
    assert "no held-out classifier" not in shown
    first, *_, last = log_of(tmp_path / "tuned")
    assert {"fd", "diversity", "held_out"} <= set(first) & set(last)
    assert not {"accuracy", "log_probability", "diversity_classes"} & set(last)
    assert {"l1", "l2", "auxiliary_loss", "reward", "gradient_norm"} <= set(last)
    assert first["held_out"] == pytest.approx(-log_of(tmp_path / "tuned")[2]["reward"], abs=0.1)
    assert load(tmp_path / "tuned").config.draw == draw
    (tmp_path / "other").mkdir()
    Pipeline(tiny_model(), tiny_config()).save(tmp_path / "other")
    refused = command(
        "tune", "student", *tuning[:-3], "other", "--out", "never", "--judge-data", "folder:pictures", refused=True
    )
    assert "other sizes, tokens or classes" in refused


def test_the_judge_of_a_run_reads_a_sample_from_all_classes(tmp_path):
    from marval.data import load_folder

    write_pictures(tmp_path / "pictures", ("a", "b"), 6)
    write_pictures(tmp_path / "pictures", ("c",), 2)
    found = load_folder(tmp_path / "pictures", (8, 8), limit=8)
    assert found.labels.bincount().tolist() == [3, 3, 2]
    assert torch.equal(found.images, load_folder(tmp_path / "pictures", (8, 8), limit=8).images)
    assert len(load_folder(tmp_path / "pictures", (8, 8), limit=99)) == 14


# --- precision ---


def test_tuning_computes_contexts_in_bf16_and_the_rest_in_float32():
    model, draw, dtypes = tiny_model().requires_grad_(True), DrawInOneStep(), {}

    def watch(name):
        return lambda module, inputs, output: dtypes.setdefault(name, set()).add(output.dtype)

    model.decoder_blocks[0].mlp.register_forward_hook(watch("transformer"))
    model.head.final_layer.register_forward_hook(watch("head"))
    gradients = {}
    for autocast in (False, True):
        dtypes.clear()
        tokens = sample(
            model, draw, torch.tensor([0, 1]), iterations=4, seeds=[1, 2], gradient_iterations=2, autocast=autocast
        )
        assert tokens.dtype == torch.float32
        tokens.square().sum().backward()
        assert dtypes["transformer"] == {torch.bfloat16 if autocast else torch.float32}
        assert dtypes["head"] == {torch.float32}
        gradients[autocast] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
    assert gradients[True].keys() == gradients[False].keys()
    for name, exact in gradients[False].items():
        if exact.abs().max() > 1e-3 and not name.endswith("qkv.bias"):
            similarity = torch.cosine_similarity(exact.flatten(), gradients[True][name].flatten(), dim=0)
            assert similarity > 0.98, name  # none of them vanishes, though two iterations ran without gradients before


def test_tuning_hands_the_setting_on(tmp_path, monkeypatch):
    seen = []
    original = finetune_module.sample
    monkeypatch.setattr(
        finetune_module, "sample", lambda *a, **options: (seen.append(options["autocast"]), original(*a, **options))[1]
    )
    student = dataclasses.replace(tiny_config(), draw=OneStep())
    for autocast in (True, False):
        settings = TuneConfig(updates=1, batch_size=2, iterations=2, autocast=autocast)
        with open_run(tmp_path / str(autocast)) as run:
            finetune_module.tune(
                tiny_model(), student, lambda images, prompts: images.mean(dim=(1, 2, 3)), settings, run,
                probe=lambda pipeline: {"fd": 1.0},
            )  # fmt: skip
    assert seen == [True, False]
    assert TuneConfig().autocast


# --- MAR's recipe ---


def test_weight_decay_shrinks_the_transformers_matrices_only():
    model = tiny_model()
    shrunk = decayed(model)
    for name, parameter in model.named_parameters():
        matrix = name.endswith("weight") and parameter.ndim == 2
        expected = matrix and not name.startswith("diffloss") and "class_emb" not in name
        assert (parameter in shrunk) == expected, name
    assert {"encoder_blocks.0.attn.qkv.weight", "z_proj.weight", "decoder_embed.weight"} <= {
        name for name, parameter in model.named_parameters() if parameter in shrunk
    }


def test_the_full_size_teacher_has_mars_recipe():
    settings = TrainConfig.imagenet256("large")
    assert settings.learning_rate == 1e-4 * settings.batch_size / 256
    epoch = 1_281_167 / settings.batch_size
    assert settings.updates / epoch == pytest.approx(400, rel=1e-3)
    assert settings.warmup / epoch == pytest.approx(100, rel=1e-3)
    assert (settings.mask_ratio_min, settings.mask_ratio_std, settings.label_drop) == (0.7, 0.25, 0.1)
    assert (settings.weight_decay, settings.ema_decay, settings.gradient_clip) == (0.02, 0.9999, 3.0)
    assert settings.tokens_per_image == MARConfig.imagenet256("large").num_tokens
    assert settings.decay == 0  # a constant rate


def test_the_full_size_recipe_reaches_the_run(command, tmp_path, monkeypatch):
    from marval.data import LatentData

    found = {}
    data = LatentData(tmp_path, torch.zeros(4).long(), ("a",), (16, 16, 16), (0,), 0.2325, 256, "vae")
    monkeypatch.setattr("marval.data.load_data", lambda spec, **_: data)
    monkeypatch.setattr(
        "marval.train.teacher.train_teacher",
        lambda config, settings, *a, **k: found.update(config=config, settings=settings) or 1,
    )
    command("train", "--preset", "imagenet256-base", "--data", "latents:cache")
    assert found["settings"] == TrainConfig.imagenet256("base")
    assert found["config"].mar.encoder_dim == 768
    assert math.isclose(found["settings"].learning_rate, 8e-4)
