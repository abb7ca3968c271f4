"""A user's own rewards and features: found from where the user stands, and their errors told in one line."""

import sys

import pytest
import torch

from marval.evaluate.features import find_features
from marval.io.own_code import OwnCode
from marval.rewards import WeightedReward, find_reward, parse_rewards, reward_hash

BRIGHT = "def score(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n"
IMAGES = torch.rand(3, 1, 4, 4)
PROMPTS = ["a", "b", "c"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, of which the search path knows nothing: as for the installed command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    return tmp_path


def scores(spec):
    return find_reward(spec)(IMAGES, PROMPTS)


@pytest.mark.parametrize(
    ("file", "spec"),
    [
        ("my_rewards.py", "my_rewards:score"),
        ("my_rewards.py", "./my_rewards.py:score"),
        ("own/rewards.py", "own.rewards:score"),
        ("my own/größe.py", "{here}/my own/größe.py:score"),
        ("json.py", "./json.py:score"),  # though a module of that name is there already
    ],
)
def test_a_function_is_found_by_module_and_by_path(file, spec, here):
    (here / file).parent.mkdir(exist_ok=True)
    (here / file).write_text(BRIGHT, encoding="utf-8")
    ((name, (reward, weight)),) = parse_rewards(spec.format(here=here) + "=0.5").items()
    assert (name, weight) == (spec.format(here=here), 0.5)
    torch.testing.assert_close(reward(IMAGES, PROMPTS), IMAGES.mean(dim=(1, 2, 3)))
    assert "dumps" in dir(sys.modules["json"])  # what others import is untouched


def test_own_code_imports_its_neighbours_and_gives_way_to_libraries_elsewhere(here):
    (here / "neighbour.py").write_text(BRIGHT)
    (here / "scipy.py").write_text("raise RuntimeError('not the library')")
    (here / "my_rewards.py").write_text("from neighbour import score\n")
    torch.testing.assert_close(scores("my_rewards:score"), IMAGES.mean(dim=(1, 2, 3)))
    assert sys.path[0] != str(here)
    assert sys.path[-1] == str(here)


def test_a_class_is_made_and_a_network_is_frozen(here):
    (here / "mine.py").write_text(
        "import torch\n"
        "class Twice:\n    def __call__(self, images, prompts):\n        return 2 * images.mean(dim=(1, 2, 3))\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.layer = torch.nn.Linear(16, 1)\n"
        "    def forward(self, images, prompts):\n        return self.layer(images.flatten(1))[:, 0]\n"
        "made = Twice()\n"
    )
    expected = 2 * IMAGES.mean(dim=(1, 2, 3))
    for name in ("Twice", "made"):
        torch.testing.assert_close(scores(f"mine:{name}"), expected)
    net = find_reward("mine:Net")
    assert not any(parameter.requires_grad for parameter in net.function.parameters())
    assert reward_hash(net) != reward_hash(find_reward("mine:Twice")) == reward_hash(find_reward("mine:made")) != ""


@pytest.mark.parametrize(
    ("content", "spec", "message"),
    [  # what cannot be loaded
        ("def score(:\n", "mine:score", r"SyntaxError: .* \(mine\.py, line 1\)"),
        ("\nimport not_there_at_all\n", "mine:score", r"mine\.py, line 2: ModuleNotFoundError: No module named 'not_"),
        (BRIGHT, "mine:scores", "mine has no function scores"),
        ("class score:\n    def __init__(self, a): pass\n", "mine:score", "missing 1 required positional argument"),
        (BRIGHT, "nowhere:score", "No module named 'nowhere'"),
        (BRIGHT, "nowhere.py:score", "FileNotFoundError: .*nowhere.py"),
        (BRIGHT, "mine:", "expected .*classifier, fd:SPACE, file.py:function or module:function"),
        # what fails when it is called
        ("def score(*a):\n    return a[0].sum(\n        dim=9)\n", "mine:score", r"mine\.py, line [23]: I"),
        ("def score(images):\n    return images\n", "mine:score", "TypeError: .*takes 1 positional argument but 2"),
        ("import sys\ndef score(*a):\n    sys.exit(3)\n", "mine:score", r"mine\.py, line 3: SystemExit: 3"),
        ("def score(*a):\n    return a[0]\n", "mine:score", r"returned \(3, 1, 4, 4\), expected one number per image"),
        ("def score(*a):\n    return [1, 2, 3]\n", "mine:score", "returned list, expected one number per image"),
        ("def score(*a):\n    raise ValueError('two\\nlines')\n", "mine:score", "ValueError: two lines"),
    ],
)
def test_what_does_not_work_is_told_in_one_line(content, spec, message, here):
    (here / "mine.py").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        WeightedReward(parse_rewards(spec))(IMAGES, PROMPTS)
    assert len(str(caught.value).splitlines()) == 1


def test_features_are_loaded_by_the_same_rules(here):
    (here / "mine.py").write_text(
        "import torch\ndef pixels(images):\n    return images.flatten(1).float()\n"
        "class Pool(torch.nn.Module):\n    def forward(self, images):\n        return images.float().mean(dim=(2, 3))\n"
        "def wrong(images):\n    return images\n"
    )
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    for spec, shape in (("mine:pixels", (2, 48)), (f"{here}/mine.py:Pool", (2, 3))):
        network = find_features(spec)
        assert network(images).shape == shape
        assert network.name.startswith(f"{spec} (")
    with pytest.raises(ValueError, match=r"features mine:wrong .*: returned \(2, 3, 4, 4\), expected \(2, features\)"):
        find_features("mine:wrong")(images)
    with pytest.raises(ValueError, match=r"--features 'mine': expected .*pixels, file\.py:function or module:function"):
        find_features("mine")
    assert OwnCode("mine:pixels", "--features").sha256 != ""
