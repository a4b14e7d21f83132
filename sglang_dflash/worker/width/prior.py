"""What a width brings before a request was served."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from sglang_dflash.errors import UserError
from sglang_dflash.step.width import Width

# A middling drafter: probabilities of its best candidates at the first position, and how the mass of each
# later one shrinks, because it is drafted without knowing what stands before it. Texts are now clear, now
# open: as many parts of the steps are drafted with the probabilities to each of these powers.
RANKS = (0.50, 0.13, 0.07, 0.045, 0.03, 0.022, 0.017, 0.014, 0.011, 0.009, 0.008, 0.007, 0.006, 0.005)
DEPTH_SHRINKS = 0.88
CLARITY = (0.15, 0.3, 0.5, 0.75, 1.0, 1.4, 2.0)

# A position of certainty cannot be raised to a power.
MOST = 1.0 - 1e-9


@lru_cache(maxsize=64)
def generic(tiers: tuple[int, ...], depth: int) -> np.ndarray:
    """float [T, depth]: the chance that the accepted path reaches a depth, in the best tree of each tier."""
    return sum((_reach(tiers, depth, power) for power in CLARITY), np.zeros(())) / len(CLARITY)


def _reach(tiers: tuple[int, ...], depth: int, power: float) -> np.ndarray:
    # The first candidate's probability to the power; the others share what it leaves.
    first = RANKS[0] ** power
    ranks = [first, *(r * (1 - first) / (1 - RANKS[0]) for r in RANKS[1:])]
    reach = np.zeros((len(tiers), depth))
    heap = [(-1.0, 0)]
    taken, sums = 0, np.zeros(depth + 1)
    for t, nodes in enumerate(tiers):
        while taken < nodes and heap:
            negative, at = heapq.heappop(heap)
            sums[at] -= negative
            taken += 1
            if at < depth:
                for share in ranks:
                    heapq.heappush(heap, (negative * share * DEPTH_SHRINKS**at, at + 1))
        reach[t] = sums[1:]
    return reach


def lucky(reach: np.ndarray, power: float) -> np.ndarray:
    """``reach`` where every token is easier (power below 1) or harder to guess; stays within 0..1."""
    return np.minimum(reach, MOST) ** power


def power_for(reach: np.ndarray, tokens: float) -> float:
    """The power that makes a pass bring ``tokens``, bonus included, with ``reach`` float [depth]."""
    low, high = 0.02, 50.0
    for _ in range(60):
        power = (low * high) ** 0.5
        if 1.0 + lucky(reach[reach > 0], power).sum() > tokens:
            low = power
        else:
            high = power
    return power


def parse(stored: Mapping[str, float]) -> dict[Width, float]:
    """``{"8x6": 2.25}`` of a drafter's ``dflash_config.tree_accept`` by width.

    Raises UserError for a key that is no width or a value that no pass can bring.
    """
    out = {}
    for key, tokens in stored.items():
        nodes, _, block = key.partition("x")
        if not (nodes.isdecimal() and block.isdecimal() and int(nodes) >= 2 and int(block) >= 2):
            raise UserError(f"the drafter's tree_accept has {key!r}; keys are nodes x block, such as 8x6")
        width = Width(int(nodes), int(block))
        most = 1 + width.drafted
        if not 1.0 <= tokens <= most:
            raise UserError(
                f"the drafter's tree_accept says {tokens} tokens for {key}, which brings 1 to {most}; "
                "evaluate the drafter again"
            )
        out[width] = float(tokens)
    return out


def prior(tiers: tuple[int, ...], block: int, accept: Mapping[Width, float]) -> np.ndarray:
    """float [T, block - 1]: the generic reach, or what fits an evaluation's accept lengths.

    Args:
        accept: tokens per pass by width, of which those nearest to this block count.
    """
    reach = generic(tiers, block - 1)
    if not accept:
        return reach
    near = min({w.block for w in accept}, key=lambda b: (abs(b - block), -b))
    rows = generic(tiers, near - 1)
    nodes = sorted(w.nodes for w in accept if w.block == near)
    powers = []
    for n in nodes:
        row = np.array([np.interp(n, tiers, rows[:, d]) for d in range(near - 1)])
        powers.append(power_for(row, accept[Width(n, near)]))
    fitted = np.interp(tiers, nodes, powers)
    return np.stack([lucky(reach[t], fitted[t]) for t in range(len(tiers))])
