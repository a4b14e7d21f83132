"""What recalled text brings past the drafter's block: the tokens that a drafted path cannot reach."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sglang_dflash.step.width import Width

# Averages over so many steps of one request each: texts begin and end to copy from one line to the next.
RECENT = 30.0
TRUTH = 2000.0
TRUTH_WORTH = 30.0  # tokens


class Beyond:
    """Expected tokens past the block, of requests that sample (1) and of those that do not (0).

    A recalled chain's own chance to hold as far as each depth is averaged over the last steps, and multiplied
    by how right it has been past the block. It holds for every block: the chain knows none.

    Args:
        deepest: D, the longest chain that a step reports; 0 where nothing is recalled.
    """

    def __init__(self, deepest: int) -> None:
        self._held = np.zeros((2, deepest))
        self._said = np.zeros(2)
        self._seen = np.zeros(2)

    def observe(
        self, width: Width, sampled: Sequence[bool], accepted: Sequence[int], held: np.ndarray
    ) -> None:
        """One step's outcome.

        Args:
            width, sampled, accepted: see :meth:`Gains.observe`.
            held: float [2, D], summed over the requests of each class, the chance that the chain is right up
                to depth d + 1, whatever the tree's size; 0 for depths that are not in it.
        """
        depths = min(held.shape[1], self._held.shape[1])
        for c in (0, 1):
            mine = [a for a, s in zip(accepted, sampled, strict=True) if bool(s) == bool(c)]
            if not mine or not np.isfinite(held[c]).all():
                continue
            now = np.zeros(self._held.shape[1])
            now[:depths] = np.clip(held[c, :depths] / len(mine), 0.0, 1.0)
            keep = math.exp(-len(mine) / RECENT)
            self._held[c] = keep * self._held[c] + (1.0 - keep) * now
            got = [a for a in mine if a > 0]
            keep = math.exp(-len(got) / TRUTH)
            said = float(now[width.drafted : width.nodes - 1].sum())
            self._said[c] = keep * self._said[c] + len(got) * said
            self._seen[c] = keep * self._seen[c] + sum(max(a - 1 - width.drafted, 0) for a in got)

    def tokens(self, c: int, width: Width) -> float:
        """Of one request's step of that width, beside what its block brings."""
        if width.plain:
            return 0.0
        right = min((self._seen[c] + TRUTH_WORTH) / (self._said[c] + TRUTH_WORTH), 3.0)
        return float(right * self._held[c, width.drafted : width.nodes - 1].sum())

    def parts(self) -> tuple[np.ndarray, ...]:
        """What is learned, for :meth:`Gains.state`."""
        return self._held, self._said, self._seen
