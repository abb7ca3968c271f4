"""Rewards of CLIP's and BLIP's families, on small random models in the real formats; and bad input."""

import shutil

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from marval.rewards import WeightedReward, find_reward, parse_rewards
from marval.runtime.rng import generator
from tiny_rewards import SIDE, tiny_sizes, write_aesthetic, write_clip, write_hps, write_image_reward  # noqa: F401

pytest.importorskip("transformers")

PROMPTS = ["a bag", "a dress", "a bag", "one more coat"]
WRITERS = {
    "clip": write_clip, "pickscore": write_clip, "hps-v2": write_hps, "image-reward": write_image_reward,
    "aesthetic": write_aesthetic,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_sizes):  # noqa: F811
    """Each family's folder and what its writer returned."""
    root = tmp_path_factory.mktemp("weights")
    return {name: (root / name, write(root / name)) for name, write in WRITERS.items()}


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
def test_score_equals_the_reference_and_its_gradient_finite_differences(name, folders):
    # Bytes, so that a processor's rounding changes nothing, at the networks' own size.
    images = torch.randint(0, 256, (4, 3, SIDE, SIDE), generator=generator("images")).float() / 255
    expected, reward = reference(name, folders, images), find_reward(f"{name}:{folders[name][0]}")
    assert expected.std() > 1e-3 * expected.abs().mean()  # the images and prompts do make a difference
    torch.testing.assert_close(reward(images, PROMPTS), expected, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():  # as evaluation calls it; training must be able to use what was remembered
        reward(images, PROMPTS)
    reward(images.requires_grad_(True), PROMPTS).sum().backward()

    reward = find_reward(f"{name}:{folders[name][0]}")
    for network in [reward] if isinstance(reward, nn.Module) else vars(reward).values():
        if isinstance(network, nn.Module):
            network.double()
    # Through the preprocessing of a picture of another size, along random directions.
    smooth = 0.3 + 0.4 * torch.rand(2, 3, 41, 37, generator=generator("smooth"), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(reward(smooth.requires_grad_(True), PROMPTS[:2]).sum(), smooth)
    for i in range(3):
        direction = torch.randn(smooth.shape, generator=generator("direction", i), dtype=torch.float64)
        step = 1e-5
        with torch.no_grad():
            up, down = (reward(smooth + sign * step * direction, PROMPTS[:2]).sum() for sign in (1, -1))
        torch.testing.assert_close((gradient * direction).sum(), (up - down) / (2 * step), rtol=1e-5, atol=1e-8)


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


@pytest.mark.parametrize("name", ["hps-v2", "image-reward", "aesthetic"])
def test_original_files_are_read_strictly_and_never_executed(name, folders, tmp_path):
    shutil.copytree(folders[name][0], tmp_path / "weights")
    (file,) = (path for path in (tmp_path / "weights").iterdir() if path.suffix in (".pt", ".pth"))
    content = torch.load(file, weights_only=True)
    tensors = content.get("state_dict", content)
    key = next(key for key in tensors if key.endswith(("ln_2.weight", "norm2.weight", "layers.2.bias")))
    others = {n: t for n, t in tensors.items() if n != key}
    for damaged, message in (
        (others, "is missing"),
        (tensors | {"something.else": torch.zeros(1)}, "unknown tensor something.else"),
        (tensors | {key: torch.zeros(3)}, "has shape"),
        ({"state_dict": Bomb()}, "would run code"),
    ):
        torch.save(damaged, file)
        with pytest.raises(ValueError, match=message):
            find_reward(f"{name}:{tmp_path / 'weights'}")
    file.rename(file.with_suffix(".other"))
    with pytest.raises(ValueError, match=r"expected one \*\.pth?, found none"):
        find_reward(f"{name}:{tmp_path / 'weights'}")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model.safetensors", "cannot be read as a CLIPModel"),
        ("vocab.json", "cannot be read as a CLIPTokenizer"),
        ("preprocessor_config.json", r"preprocessor_config\.json is missing"),
    ],
)
def test_a_clip_that_is_not_whole_is_refused(file, message, folders, tmp_path):
    shutil.copytree(folders["clip"][0], tmp_path / "clip")
    (tmp_path / "clip" / file).unlink()
    with pytest.raises(ValueError, match=message) as refused:
        find_reward(f"clip:{tmp_path / 'clip'}")
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("name", WRITERS)
def test_without_a_network_the_message_says_which_files_to_put_where(name, monkeypatch):
    def no_network(*arguments, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    with pytest.raises(ValueError, match=r"no network; or put its .* into a folder, and write NAME:FOLDER"):
        parse_rewards(name)


def test_rewards_from_folders_combine_with_weights(folders):
    images = torch.rand(4, 3, SIDE, SIDE, generator=generator("images"))
    parts = parse_rewards(f"pickscore:{folders['pickscore'][0]}, clip:{folders['clip'][0]}=0.5")
    first, second = (reward(images, PROMPTS) for reward, _ in parts.values())
    torch.testing.assert_close(WeightedReward(parts)(images, PROMPTS), first + 0.5 * second)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pixscore", "expected pickscore, clip, image-reward, hps-v2, aesthetic"),
        ("math:no_such_function", "no function"),
        ("classifier=much", "could not convert string to float: 'much'"),
        ("classifier,classifier=2", "named twice"),
        ("classifier:nothing.safetensors,classifier=nan", "weight nan of classifier: expected a finite number"),
        ("classifier:nothing.safetensors", "does not exist: make one with marval train classifier"),
    ],
)
def test_bad_names_and_weights(text, message):
    with pytest.raises(ValueError, match=message):
        parse_rewards(text)
