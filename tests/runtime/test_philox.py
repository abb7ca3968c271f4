"""Counter-based random numbers: the published ones, independent of the batch, and Gaussian."""

import pytest
import torch
from scipy import stats

from marval.runtime.philox import philox, random_words, standard_normal, stream_keys

FULL = 0xFFFFFFFF
KEYS = stream_keys([(7, "image"), (-3, "image"), (2**80, "image")])


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers that the authors publish with their library, Random123
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([FULL] * 4, [FULL] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_numbers(counter, key, expected):
    words = philox([torch.tensor(word) for word in counter], [torch.tensor(word) for word in key])
    assert [int(word) for word in words] == expected


def test_numbers_depend_on_the_key_and_the_place_alone(monkeypatch):
    whole = standard_normal(KEYS, (5, 3, 2))
    for i in range(3):
        assert torch.equal(standard_normal(KEYS[i : i + 1], (5, 3, 2))[0], whole[i])
        assert torch.equal(standard_normal(KEYS[i : i + 1], (2, 3, 2))[0], whole[i, :2])
    monkeypatch.setattr("marval.runtime.philox.TOGETHER", 6)  # two blocks of counters for an image
    assert torch.equal(standard_normal(KEYS, (5, 3, 2)), whole)


def test_they_are_uniform_and_gaussian():
    words = random_words(KEYS, 40_001).flatten()
    assert words.min() >= 0
    assert words.max() <= FULL
    assert stats.kstest(words.double() / 2**32, "uniform").pvalue > 0.01
    numbers = standard_normal(KEYS, (40_001,))
    assert stats.kstest(numbers.flatten(), "norm").pvalue > 0.01
    assert torch.corrcoef(torch.cat([numbers[:, 1:], numbers[:, :-1]])).triu(1).abs().max() < 0.02
