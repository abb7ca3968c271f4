"""Rewards of CLIP's and BLIP's families, on small random models in the real formats; and bad input."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from marval.rewards import WeightedReward, find_reward, parse_rewards
from marval.runtime.rng import generator
from tiny_rewards import SIDE, write_aesthetic, write_clip, write_hps, write_image_reward

pytest.importorskip("transformers")

PROMPTS = ["a bag", "a dress", "a bag", "one more coat"]
WRITERS = {
    "clip": write_clip, "pickscore": write_clip, "hps-v2": write_hps, "image-reward": write_image_reward,
    "aesthetic": write_aesthetic,
}  # fmt: skip
WEIGHTS = {"hps-v2": "HPS_v2.1_compressed.pt", "image-reward": "ImageReward.pt", "aesthetic": "*.pth"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each family's folder and what its writer returned."""
    root = tmp_path_factory.mktemp("weights")
    return {name: (root / name, write(root / name)) for name, write in WRITERS.items()}


@pytest.fixture
def images():
    """Bytes, so that a processor's rounding changes nothing, at the networks' own size."""
    x = torch.randint(0, 256, (4, 3, SIDE, SIDE), generator=generator("images")).float()
    return x / 255


@torch.no_grad()
def reference(name, folders, images):
    """The score by transformers' own model, processor and tokenizer, or by the network that wrote the checkpoint."""
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder, original = folders[name]
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    pixels = processor([(x * 255).round().byte().numpy() for x in images], return_tensors="pt")["pixel_values"]
    kind, length = ("BertTokenizer", 35) if name == "image-reward" else ("CLIPTokenizer", 16)
    tokens = getattr(transformers, kind).from_pretrained(folder)(
        PROMPTS, padding="max_length" if "-" in name else True, truncation=True, max_length=length, return_tensors="pt"
    )
    if name == "image-reward":
        return original(pixels, tokens.input_ids, tokens.attention_mask)
    if name == "hps-v2":
        return original(pixels, tokens.input_ids)
    outputs = transformers.CLIPModel.from_pretrained(folder).eval()(pixel_values=pixels, **tokens)
    if name == "aesthetic":
        return nn.Sequential(*original[1].values())(outputs.image_embeds)[:, 0]
    if name == "pickscore":
        return outputs.logits_per_image.diagonal()
    return 100 * F.cosine_similarity(outputs.image_embeds, outputs.text_embeds)


@pytest.mark.parametrize("name", WRITERS)
def test_score_equals_the_reference(name, folders, images):
    expected = reference(name, folders, images)
    reward = find_reward(f"{name}:{folders[name][0]}")
    score = reward(images, PROMPTS)
    assert reward.preprocessing.fit == ("pad" if name == "hps-v2" else "crop")  # of what is not square
    assert expected.std() > 1e-3 * expected.abs().mean()  # the images and prompts do make a difference
    torch.testing.assert_close(score, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", WRITERS)
def test_gradient_equals_finite_differences_in_float64(name, folders):
    """Through the preprocessing of a picture of another size, along random directions."""
    reward = find_reward(f"{name}:{folders[name][0]}")
    for part in ("model", "head", "network"):
        if hasattr(reward, part):
            getattr(reward, part).double()
    images = 0.3 + 0.4 * torch.rand(2, 3, 41, 37, generator=generator("smooth"), dtype=torch.float64)
    images.requires_grad_(True)
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS[:2]).sum(), images)
    assert gradient.isfinite().all()
    for i in range(3):
        direction = torch.randn(images.shape, generator=generator("direction", i), dtype=torch.float64)
        step = 1e-5
        with torch.no_grad():
            up, down = (reward(images + sign * step * direction, PROMPTS[:2]).sum() for sign in (1, -1))
        torch.testing.assert_close((gradient * direction).sum(), (up - down) / (2 * step), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["clip", "pickscore", "hps-v2", "image-reward"])
def test_what_depends_on_the_prompt_alone_is_computed_once(name, folders, images, monkeypatch):
    reward = find_reward(f"{name}:{folders[name][0]}")
    calls = []
    original = reward.text.of
    monkeypatch.setattr(reward.text, "of", lambda prompt: (calls.append(prompt), original(prompt))[1])
    with torch.inference_mode():  # as evaluation calls it; training must be able to use what was remembered
        first = reward(images, PROMPTS)
    pixels = images.clone().requires_grad_(True)
    again = reward(pixels, PROMPTS)
    again.sum().backward()
    assert calls == ["a bag", "a dress", "one more coat"]
    torch.testing.assert_close(first, again)


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


@pytest.mark.parametrize("name", ["hps-v2", "image-reward", "aesthetic"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "is missing"),
        ("unknown", "unknown tensor something.else"),
        ("misshapen", "has shape"),
        ("no checkpoint", "damaged"),
        ("code", "would run code"),
        ("two files", r"expected one \*\.pth? in .*, found"),
    ],
)
def test_original_files_are_read_strictly_and_never_executed(name, damage, message, folders, tmp_path):
    folder = tmp_path / "weights"
    shutil.copytree(folders[name][0], folder)
    (file,) = folder.glob(WEIGHTS[name])
    content = torch.load(file, weights_only=True)
    tensors = content.get("state_dict", content)
    key = next(key for key in tensors if key.endswith(("ln_2.weight", "norm2.weight", "layers.2.bias")))
    if damage == "missing":
        del tensors[key]
    elif damage == "unknown":
        tensors["something.else"] = torch.zeros(1)
    elif damage == "misshapen":
        tensors[key] = torch.zeros(3)
    torch.save({"state_dict": Bomb()} if damage == "code" else content, file)
    if damage == "no checkpoint":
        file.write_bytes(b"hello")
    elif damage == "two files":
        shutil.copy(file, folder / f"second{file.suffix}")
    with pytest.raises(ValueError, match=message):
        find_reward(f"{name}:{folder}")


def test_a_clip_with_missing_tensors_is_refused(folders, tmp_path):
    shutil.copytree(folders["clip"][0], tmp_path / "clip")
    file = tmp_path / "clip/model.safetensors"
    tensors = {key: t.clone() for key, t in load_file(file).items() if key != "visual_projection.weight"}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys visual_projection\.weight"):
        find_reward(f"clip:{tmp_path / 'clip'}")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pickscore", ["config.json", "safetensors", "yuvalkirstain/PickScore_v1", "pickscore:FOLDER"]),
        ("clip", ["openai/clip-vit-large-patch14", "clip:FOLDER"]),
        ("hps-v2", ["HPS_v2.1_compressed.pt", "xswu/HPSv2", "tokenizer.json"]),
        ("image-reward", ["ImageReward.pt", "bert-base-uncased"]),
        ("aesthetic", ["aesthetic-model.pth", "openai/clip-vit-large-patch14"]),
    ],
)
def test_without_weights_and_network_the_message_says_which_files_to_put_where(name, words, monkeypatch, tmp_path):
    import huggingface_hub

    def no_network(*arguments, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    with pytest.raises(ValueError, match="put them") as caught:
        parse_rewards(name)
    assert all(word in str(caught.value) for word in words)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ValueError, match="the folder lacks them"):
        parse_rewards(f"{name}:{tmp_path}")


def test_rewards_from_folders_combine_with_weights(folders, images):
    clip, pickscore = folders["clip"][0], folders["pickscore"][0]
    parts = parse_rewards(f"pickscore:{pickscore}=1,clip:{clip}=0.5")
    assert [weight for _, weight in parts.values()] == [1.0, 0.5]
    combined = WeightedReward(parts)(images, PROMPTS)
    first, second = (reward(images, PROMPTS) for reward, _ in parts.values())
    torch.testing.assert_close(combined, first + 0.5 * second)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pixscore", "expected pickscore, clip, image-reward, hps-v2, aesthetic"),
        ("no_such_module:f", "no module no_such_module in"),
        ("math:no_such_function", "no function"),
        ("classifier=much", "could not convert string to float: 'much'"),
        ("classifier=inf", "weight inf: expected a finite number"),
        ("classifier,classifier=2", "named twice"),
        ("classifier:nothing.safetensors", "does not exist: make one with marval train classifier"),
    ],
)
def test_bad_names_and_weights(text, message):
    with pytest.raises(ValueError, match=message):
        parse_rewards(text)
