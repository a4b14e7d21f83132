"""What a step brings: expected tokens of every width, from the drafter's own probabilities put right.

A drafter says with every block how likely the accepted path reaches each depth, in the tree it was asked for
and in the wider ones (``mass``). Its word is noisy from step to step and wrong on average; what was accepted
is right on average and far noisier. So the word is averaged over the last steps, and multiplied by how right
it has been, by block and depth. Blocks that were not drafted lately are taken at their long-run average,
moved by as much as the block in use is better or worse than its own average (``luck``).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sglang_dflash.step.width import Width
from sglang_dflash.worker.width.prior import MOST, lucky, parse, prior
from sglang_dflash.worker.width.tiers import TIERS

GREEDY, SAMPLED = 0, 1

# Averages over so many steps of one request each (a batch of 16 counts as 16).
RECENT = 100.0
UNSEEN = 500.0
LONG = 4000.0
TRUTH = 2000.0

# How many such steps the starting values are worth.
PRIOR_WORTH = 30.0
TRUTH_WORTH = 60.0
LUCK_WORTH = 20.0

# A single step's average over a batch is not as good as as many steps: one text's steps are alike, and a
# whole batch may be in the same phase.
MOST_PER_STEP = 16.0


class Gains:
    """Expected tokens per request and step.

    Args:
        block: B, the drafter's greatest block.
        accept, accept_sampled: what an evaluation of the drafter stored (``dflash_config.tree_accept`` and
            ``tree_accept_sampled``): tokens per pass by width, ``{"8x6": 2.25}``; empty where there was none.

    Raises UserError where a stored evaluation cannot be.
    """

    def __init__(
        self,
        block: int,
        accept: Mapping[str, float] | None = None,
        accept_sampled: Mapping[str, float] | None = None,
    ) -> None:
        self.blocks = tuple(range(2, block + 1))
        self.version = 0
        greedy = parse(accept or {})
        starts = (greedy, parse(accept_sampled or {}) or greedy)
        shape = (2, len(self.blocks), len(TIERS), max(block - 1, 1))
        self._valid = np.zeros(shape, dtype=bool)
        self._long = np.zeros(shape)  # reach by (class, block, tier, depth), over a long time
        for c, start in enumerate(starts):
            for i, b in enumerate(self.blocks):
                self._long[c, i, :, : b - 1] = prior(TIERS, b, start)
                self._valid[c, i, 1:, : b - 1] = True
        self._long_weight = np.full(shape[:3], PRIOR_WORTH)
        self._sum = np.zeros(shape)  # recent mass, and steps it is of
        self._weight = np.zeros(shape[:3])
        self._said = np.zeros((2, shape[1], shape[3]))  # reach foretold and seen, at the widths in force
        self._seen = np.zeros((2, shape[1], shape[3]))
        self._power = np.ones(2)  # luck: reach is the long-run one to this power
        self._tokens: dict[int, np.ndarray] = {}

    # What steps show -----------------------------------------------------------------------------------

    def observe(self, width: Width, sampled: Sequence[bool], accepted: Sequence[int], mass: Any) -> None:
        """One step's outcome.

        Args:
            width: the step's.
            sampled: per request, whether it draws its tokens.
            accepted: per request, the tokens it got from the pass, bonus included; 0 for one that had ended.
            mass: float [2 (greedy, sampled), T, L], nested lists or an array: summed over the requests of
                that class, the drafter's probability that the accepted path reaches depth d + 1 in the best
                tree of ``TIERS[t]`` nodes. T and L may be shorter than ours. None for a plain step.
        """
        if width.plain or mass is None or width.block not in self.blocks:
            # The texts move on unseen: what was recent slowly counts for less.
            fade = math.exp(-min(len(accepted), MOST_PER_STEP) / UNSEEN)
            self._sum *= fade
            self._weight *= fade
            return
        said = np.asarray(mass, dtype=float)
        if said.ndim != 3 or said.shape[0] != 2:
            raise ValueError(f"mass is [2, T, L], not {said.shape}")
        tiers = min(said.shape[1], len(TIERS))
        depth = min(said.shape[2], width.depth)
        i = self.blocks.index(width.block)
        for c in (GREEDY, SAMPLED):
            mine = [a for a, s in zip(accepted, sampled, strict=True) if bool(s) == bool(c)]
            if not mine:
                continue
            reach = said[c, :tiers, :depth] / len(mine)
            if np.isfinite(reach).all():
                self._learn(c, i, width, np.clip(reach, 0.0, 1.0), [a for a in mine if a > 0])
        self.version += 1
        self._tokens.clear()

    def _learn(self, c: int, i: int, width: Width, reach: np.ndarray, accepted: list[int]) -> None:
        depth = reach.shape[1]
        # Tiers with nothing at depth 1 were not computed; the plain tier never is.
        have = np.flatnonzero(reach[:, 0] > 0)
        if not len(have):
            return
        worth = min(float(len(accepted)) or 1.0, MOST_PER_STEP)
        # Recent averages of this class fade whatever the block: they are of texts that have gone by.
        fade = math.exp(-worth / RECENT)
        self._sum[c] *= fade
        self._weight[c] *= fade
        self._sum[c, i, have, :depth] += worth * reach[have]
        self._weight[c, i, have] += worth
        self._learn_luck(c, i, have)
        weight = self._long_weight[c, i, have]
        step = (worth / (weight + worth))[:, None]
        self._long[c, i, have, :depth] += step * (reach[have] - self._long[c, i, have, :depth])
        self._long_weight[c, i, have] = np.minimum(weight + worth, LONG)
        if accepted:
            keep = math.exp(-len(accepted) / TRUTH)
            self._said[c, i] *= keep
            self._seen[c, i] *= keep
            got = np.asarray(accepted)
            for d in range(depth):
                said = float(np.interp(width.nodes, [TIERS[t] for t in have], reach[have, d]))
                self._said[c, i, d] += len(accepted) * said
                self._seen[c, i, d] += float((got > d + 1).sum())

    def _learn_luck(self, c: int, i: int, have: np.ndarray) -> None:
        weight = self._weight[c, i, have].sum()
        recent = self._sum[c, i, have, 0].sum() / weight
        long = float((self._long[c, i, have, 0] * self._weight[c, i, have]).sum() / weight)
        now = math.log(min(max(recent, 1e-3), MOST)) / math.log(min(max(long, 1e-3), 0.999))
        steps = float(self._weight[c, i, have[0]])
        share = steps / (steps + LUCK_WORTH)
        # Another block's luck was measured on texts gone by; this one's takes over as it is seen.
        self._power[c] += share * (min(max(now, 0.3), 3.0) - self._power[c])

    # What a step brings --------------------------------------------------------------------------------

    def tokens(self, width: Width, sampled_share: float) -> float:
        """Expected tokens of a request's step, bonus included: 1 for a plain one.

        Args:
            sampled_share: share of the batch's requests that draw their tokens, 0..1.
        """
        return self.of([width], sampled_share)[0]

    def of(self, widths: Sequence[Width], sampled_share: float) -> list[float]:
        """:meth:`tokens` of many widths at once."""
        table = (1.0 - sampled_share) * self._table(GREEDY) + sampled_share * self._table(SAMPLED)
        out = []
        for width in widths:
            if width.plain or width.block < 2:
                out.append(1.0)
                continue
            row = table[width.block - 2]
            t = bisect_left(TIERS, width.nodes)
            share = 0.0 if TIERS[t] == width.nodes else (TIERS[t] - width.nodes) / (TIERS[t] - TIERS[t - 1])
            out.append(float(row[t] + share * (row[t - 1] - row[t])))
        return out

    def doubt(self, block: int, sampled_share: float) -> float:
        """Standard deviation of the log of :meth:`tokens` for this block, roughly."""
        i = self.blocks.index(block)
        c = SAMPLED if sampled_share > 0.5 else GREEDY
        return 0.25 / math.sqrt(1.0 + float(self._weight[c, i, 1]) / 4)

    def _table(self, c: int) -> np.ndarray:
        found = self._tokens.get(c)
        if found is None:
            found = self._tokens[c] = 1.0 + self._reach(c).sum(2)
        return found

    def _reach(self, c: int) -> np.ndarray:
        """[blocks, tiers, depth], put right by what happened."""
        usual = np.where(self._valid[c], lucky(self._long[c], float(self._power[c])), 0.0)
        weight = self._weight[c][:, :, None]
        reach = (self._sum[c] + PRIOR_WORTH * usual) / (weight + PRIOR_WORTH)
        truth = self._truth(c)
        reach = np.minimum(reach * truth[:, None, :], 1.0)
        # A deeper node needs the one above it; a wider tree holds the narrower one.
        reach = np.minimum.accumulate(reach, axis=2)
        return np.maximum.accumulate(np.where(self._valid[c], reach, 0.0), axis=1)

    def _truth(self, c: int) -> np.ndarray:
        """[blocks, depth]: seen over foretold. A block that was tried little leans on the others."""
        said, seen = self._said[c], self._seen[c]
        together = (seen.sum(0) + TRUTH_WORTH) / (said.sum(0) + TRUTH_WORTH)
        worth = TRUTH_WORTH * 0.3
        return np.clip((seen + worth * together) / (said + worth), 0.2, 3.0)

    # The other ranks -----------------------------------------------------------------------------------

    def state(self) -> list[float]:
        parts = (self._long, self._long_weight, self._sum, self._weight, self._said, self._seen, self._power)
        return [float(self.version), *(x for part in parts for x in part.ravel().tolist())]

    def load(self, state: Sequence[float]) -> None:
        """Raises ValueError where ``state`` is of other blocks."""
        parts = (self._long, self._long_weight, self._sum, self._weight, self._said, self._seen, self._power)
        if len(state) != 1 + sum(part.size for part in parts):
            raise ValueError("not the state of these gains")
        self.version, at = int(state[0]), 1
        for part in parts:
            part[...] = np.reshape(state[at : at + part.size], part.shape)
            at += part.size
        self._tokens.clear()
