"""Which width a step takes."""

from __future__ import annotations

import random
import re

from sglang_dflash.errors import UserError
from sglang_dflash.step.width import PLAIN, Width


class Fixed:
    """Always the same width."""

    def __init__(self, width: Width) -> None:
        self.width = width

    def choose(self, requests: int, length: float, sampled_share: float) -> Width:
        return self.width


class Random:
    """Another width every step, for tests: what is exact must not depend on it."""

    def __init__(self, seed: int, widest: Width) -> None:
        self._draw, self._widest = random.Random(seed), widest

    def choose(self, requests: int, length: float, sampled_share: float) -> Width:
        nodes, block = self._draw.randint(1, self._widest.nodes), self._draw.randint(1, self._widest.block)
        return PLAIN if nodes == 1 or block == 1 else Width(nodes, block)


def make_policy(setting: str, widest: Width) -> Fixed | Random:
    if setting in ("auto", "fixed"):
        return Fixed(widest)
    if found := re.fullmatch(r"random:(\d+)", setting):
        return Random(int(found[1]), widest)
    if found := re.fullmatch(r"(\d+)x(\d+)", setting):
        return Fixed(Width(int(found[1]), int(found[2])))
    raise UserError(f"SGLANG_DFLASH_WIDTH={setting!r} is not a width")
