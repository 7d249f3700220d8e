import pytest
import torch

from kernels.philox import philox, recurrent_mask, zoneout_masks

ONES = 0xFFFFFFFF


# Known answers published with Random123 (Salmon et al. 2011), philox4x32 with 10 rounds.
@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        pytest.param((0, 0), (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8", id="zeros"),
        pytest.param((ONES,) * 2, (ONES,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd", id="ones"),
        pytest.param(
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
            id="pi",
        ),
    ],
)
def test_known_answers(key, counter, expected):
    values = philox(key[0] | key[1] << 32, *counter)
    assert " ".join(f"{int(v):08x}" for v in values) == expected


def test_counters_broadcast():
    rows, units = torch.arange(3)[:, None], torch.arange(4)
    grid = philox(7, 0, rows, units, 1)
    assert grid[0].shape == (3, 4)
    assert all(int(g[2, 3]) == int(v) for g, v in zip(grid, philox(7, 0, 2, 3, 1), strict=True))


def test_masks_are_a_function_of_the_seed_and_of_nothing_else():
    arguments = (0.25, 2, 3, 4, torch.device("cpu"))
    assert torch.equal(recurrent_mask(5, *arguments), recurrent_mask(5, *arguments))
    assert not torch.equal(recurrent_mask(5, *arguments), recurrent_mask(6, *arguments))


@pytest.mark.parametrize("drop", [0.1, 0.5])
def test_rates(drop):
    shape = (2, 100, 200)
    masks = [
        recurrent_mask(3, drop, *shape, torch.device("cpu")),
        *zoneout_masks(3, drop, 4, *shape, torch.device("cpu")),
    ]
    deviation = (drop * (1 - drop) / 40_000) ** 0.5
    for mask in masks:
        assert abs(mask.double().mean().item() - (1 - drop)) < 5 * deviation
    assert not torch.equal(masks[1], masks[2])
