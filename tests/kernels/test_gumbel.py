"""The seeded race: quality of its noise, exactness of its samples, one result on every implementation."""

from __future__ import annotations

import math

import pytest
import torch
from dflash_kernels import race_argmax, race_noise, race_noise_at
from dflash_kernels._dispatch import interpreting
from dflash_kernels.gumbel.reference import race_argmax_torch, race_bits, race_noise_torch

torch_only = pytest.mark.skipif(interpreting(), reason="a property of the torch path")


def grid(seeds: int, positions: int, seed0: int = 0, position0: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Every pair of ``seeds`` neighbouring seeds and ``positions`` neighbouring positions."""
    pairs = torch.cartesian_prod(torch.arange(seeds) + seed0, torch.arange(positions) + position0)
    return pairs[:, 0], pairs[:, 1]


def mix(x: int) -> int:
    """The hash's bijection in Python integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def bits(seed: int, position: int, token: int) -> int:
    """31 bits of one token, written with unsigned Python integers."""
    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    first = mix(mix(mix(low ^ 0x243F6A88) ^ high) ^ position)
    second = mix((mix(mix(high ^ 0x85A308D3) ^ low) + position) & 0xFFFFFFFF)
    x = (mix(token ^ first) + second) * 0x31848BAB & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x7FEB352D & 0xFFFFFFFF
    return (x ^ x >> 16) >> 1


SEEDS = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 1 << 40, 0x9E3779B97F4A7C15 - 2**64])
POSITIONS = torch.tensor([0, 1, 2**31 - 1, 5, 131_072, 7, 2**32 - 1])


@torch_only
def test_bits_are_those_of_unsigned_arithmetic():
    got = race_bits(SEEDS, POSITIONS, 300)
    want = [
        [bits(seed, position, token) for token in range(300)]
        for seed, position in zip(SEEDS.tolist(), POSITIONS.tolist(), strict=True)
    ]
    assert got.tolist() == want


def test_noise_is_the_same_everywhere(backend):
    """Equal bits; the logarithms of two libraries agree to a few units in the last place."""
    vocab = 1100 if interpreting() else 20_000
    got = backend.race_noise(SEEDS.to(backend.device), POSITIONS.to(backend.device), vocab).cpu()
    want = -torch.log1p(-((race_bits(SEEDS, POSITIONS, vocab).double() + 0.5) * 2.0**-31))
    # Towards the large values, which lose every race, float32 rounds 1 - u.
    assert ((got.double() - want).abs() <= 2e-6 * want + 2.0**-23 * want.exp()).all()


def test_noise_of_some_tokens(backend):
    """Both by the dispatcher: on a GPU the torch implementation's logarithm has other last bits."""
    seeds, positions = SEEDS.to(backend.device), POSITIONS.to(backend.device)
    ids = torch.randint(0, 900, (len(SEEDS), 5))
    got = race_noise_at(seeds, positions, ids.to(backend.device))
    assert torch.equal(got.cpu(), race_noise(seeds, positions, 900).cpu().gather(1, ids))


def test_argmax_is_the_same_everywhere(backend):
    vocab, rows, groups = 2500, 12, 5
    logits = torch.randn(rows, vocab) * 3
    logits[torch.rand(rows, vocab) < 0.3] = float("-inf")
    probs = logits.softmax(1)
    seeds, positions = torch.randint(-(2**62), 2**62, (groups,)), torch.randint(0, 9999, (groups,))
    row_group = torch.randint(0, groups, (rows,))
    got = backend.race_argmax(
        probs.to(backend.device),
        seeds.to(backend.device),
        positions.to(backend.device),
        row_group.to(backend.device),
    ).cpu()
    score = probs.double() / race_noise_torch(seeds, positions, vocab)[row_group].double()
    assert torch.equal(got, score.argmax(1))
    assert (probs.gather(1, got[:, None]) > 0).all()
    alone = race_argmax_torch(probs, seeds[row_group], positions[row_group])
    assert torch.equal(got, alone)


def test_a_single_possible_token_is_chosen_whatever_its_noise(backend):
    """1.0 against zeros, at every id of a range, so that large and small noise both occur."""
    n = 40 if interpreting() else 600
    probs = torch.eye(n, device=backend.device)
    seeds = torch.full((n,), 3, device=backend.device)
    got = backend.race_argmax(probs, seeds, torch.arange(n, device=backend.device), None)
    assert torch.equal(got.cpu(), torch.arange(n))


def test_equal_scores_take_the_lower_id(backend):
    """Probabilities made proportional to the noise: every score is exactly 0.5."""
    seeds, positions = torch.tensor([5]), torch.tensor([9])
    noise = backend.race_noise(seeds.to(backend.device), positions.to(backend.device), 1030)
    probs = noise / 2
    probs[:, :1025] = 0.0
    got = backend.race_argmax(probs, seeds.to(backend.device), positions.to(backend.device), None)
    assert got.tolist() == [1025]


@torch_only
def test_noise_is_inside_its_range():
    noise = race_noise(*grid(40, 10), 20_000)
    assert torch.isfinite(noise).all()
    assert (noise > 0).all()
    assert noise.min() < 1e-6
    assert noise.max() > 14


def chi_square_bound(freedom: int) -> float:
    """Five sigma of the chi-square's normal approximation."""
    return freedom + 5 * math.sqrt(2 * freedom) + 5


def uniformity(values: torch.Tensor, cells: int) -> float:
    counts = torch.bincount(values.reshape(-1), minlength=cells).double()
    expected = values.numel() / cells
    return float(((counts - expected) ** 2 / expected).sum())


@torch_only
@pytest.mark.parametrize("shift", [0, 5, 11, 17, 23])
def test_every_part_of_the_bits_is_uniform(shift: int):
    """Eight bits at a time, over small consecutive seeds, positions and ids: the worst inputs."""
    words = race_bits(*grid(24, 24), 2000) >> shift & 255
    assert uniformity(words, 256) < chi_square_bound(255)


@torch_only
@pytest.mark.parametrize("axis", ["seed", "position", "id", "seed and position", "high half of the seed"])
@pytest.mark.parametrize("shift", [0, 13, 27])
def test_neighbours_are_independent(axis: str, shift: int):
    """The joint of a token's bits and its neighbour's is uniform, 4 bits of each."""
    step = {
        "seed": (1, 0, 0),
        "position": (0, 1, 0),
        "id": (0, 0, 1),
        "seed and position": (1, -1, 0),
        "high half of the seed": (1 << 32, 0, 0),
    }[axis]
    seeds, positions = grid(16, 16, seed0=1000, position0=50)
    here = race_bits(seeds, positions, 2001)[:, :2000] >> shift & 15
    there = race_bits(seeds + step[0], positions + step[1], 2001)[:, step[2] : 2000 + step[2]] >> shift & 15
    assert uniformity(here * 16 + there, 256) < chi_square_bound(255)


@torch_only
def test_rows_are_not_correlated():
    """The correlation of any two rows of 400 stays within what independent noise shows."""
    noise = -race_noise(*grid(20, 20), 4096).log()
    noise = (noise - noise.mean(1, keepdim=True)) / noise.std(1, keepdim=True)
    matrix = noise @ noise.t() / noise.shape[1]
    off = matrix[~torch.eye(len(matrix), dtype=torch.bool)]
    assert float(off.abs().max()) < 6 / math.sqrt(4096)
    assert abs(float(off.std()) * math.sqrt(4096) - 1) < 0.05


@torch_only
@pytest.mark.parametrize("over", ["seeds", "positions"])
def test_samples_follow_the_distribution(over: str):
    """Neighbouring seeds at one position, and neighbouring positions of one seed."""
    draws, vocab = 60_000, 40
    probs = (torch.randn(vocab) * 2).softmax(0)
    step = torch.arange(draws)
    seeds, positions = (step, step * 0 + 17) if over == "seeds" else (step * 0 + 1234, step)
    got = race_argmax(probs.expand(draws, -1), seeds, positions)
    counts = torch.bincount(got, minlength=vocab).double()
    large = probs.double() * draws >= 8
    counts = torch.cat([counts[large], counts[~large].sum()[None]])
    expected = torch.cat([probs.double()[large], probs.double()[~large].sum()[None]]) * draws
    keep = expected >= 8
    statistic = float(((counts - expected) ** 2 / expected)[keep].sum())
    assert statistic < chi_square_bound(int(keep.sum()) - 1)
