"""A machine and a drafter whose prices and luck are known, for the tests of the width policy."""

from __future__ import annotations

import random

import numpy as np

from sglang_dflash.step.width import Width
from sglang_dflash.worker.width.cost import Cell, CostTable
from sglang_dflash.worker.width.gain import Gains
from sglang_dflash.worker.width.policy import WidthPolicy
from sglang_dflash.worker.width.prior import generic
from sglang_dflash.worker.width.tiers import TIERS

LENGTH = 256.0


def target_ms(n: int, requests: int) -> float:
    """A staircase of 16 rows over a floor; plain decoding is a tenth cheaper than one tree row."""
    rows = n * requests
    return (60.0 + 1.5 * (-(-rows // 16) * 16)) * (0.9 if n == 1 else 1.0)


def draft_ms(b: int, requests: int) -> float:
    return 5.0 + 0.2 * b * requests


def step_ms(width: Width, requests: int) -> float:
    draft = 0.0 if width.plain else draft_ms(width.block, requests)
    return target_ms(width.nodes, requests) + draft


def table(**more) -> CostTable:
    """Every tier to 32 and block to 6 at 1, 4, 16 and 64 requests, without noise."""
    cells = [
        Cell(what="target", rows=n, requests=r, length=256, ms=target_ms(n, r))
        for n in TIERS
        if n <= 32
        for r in (1, 4, 16, 64)
    ]
    cells += [
        Cell(what="draft", rows=b, requests=r, length=256, ms=draft_ms(b, r))
        for b in (2, 6)
        for r in (1, 4, 16, 64)
    ]
    return CostTable(cells, **more)


def reach(width: Width, power: float) -> np.ndarray:
    """[T, depth] of a drafter that is so lucky: below 1 luckier than the generic one."""
    return np.minimum(generic(TIERS, width.depth), 1 - 1e-9) ** power


class Decoding:
    """Serves one policy: outcomes are drawn from the reach, times come with noise."""

    def __init__(self, policy: WidthPolicy, seed: int = 0, power: float = 1.0, noise: float = 0.05) -> None:
        self.policy, self.power, self.noise = policy, power, noise
        self.rng = random.Random(seed)
        self.ms = self.tokens = 0.0
        self.widths: list[Width] = []

    def expected(self, width: Width) -> float:
        if width.plain:
            return 1.0
        return 1.0 + float(reach(width, self.power)[TIERS.index(width.nodes)].sum())

    def step(self, requests: int, slow: float = 1.0) -> Width:
        width = self.policy.choose(requests, LENGTH, 0.0)
        accepted, mass = [1] * requests, None
        if not width.plain:
            by_tier = reach(width, self.power)
            mine = by_tier[TIERS.index(width.nodes)]
            mass = np.zeros((2, *by_tier.shape))
            # The drafter says less than is true, always by the same share, and wavers from step to step.
            mass[0] = by_tier * 0.8 * self.rng.uniform(0.7, 1.3) * requests
            for i in range(requests):
                luck = self.rng.random()
                accepted[i] = 1 + sum(luck < chance for chance in mine)
        ms = step_ms(width, requests)
        self.ms += ms
        self.tokens += self.expected(width) * requests
        self.widths.append(width)
        self.policy.cost.observe(width, requests, LENGTH, ms * slow * np.exp(self.rng.gauss(0, self.noise)))
        self.policy.gains.observe(width, [False] * requests, accepted, mass)
        return width

    def best(self, requests: int) -> tuple[Width, float]:
        rates = {w: self.expected(w) * requests / step_ms(w, requests) for w in self.policy.candidates}
        width = max(rates, key=rates.__getitem__)
        return width, rates[width]


def decoding(widest: Width = Width(32, 6), **more) -> Decoding:
    return Decoding(WidthPolicy(widest, table(), Gains(widest.block)), **more)
