"""What a step brings: expected tokens of every width, from the drafter's own probabilities put right.

A drafter says with every block how likely the accepted path reaches each depth, in the tree it was asked for
and in the wider ones (``mass``). Its word is noisy from step to step and wrong on average; what was accepted
is right on average and far noisier. So the word is averaged over the last steps (``recent``), and multiplied
by how right it has been, by block and depth (``truth``). All blocks share one average, each seen through how
much better or worse it drafts than the others (``quality``): what one block shows of the text holds for all.
What was not seen lately is taken at its long-run average, moved by as much as the recent text is easier or
harder than the average (``luck``). Where the text changes kind (``turns``), the recent is soon forgotten.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sglang_dflash.step.width import Width
from sglang_dflash.worker.width.beyond import Beyond
from sglang_dflash.worker.width.prior import MOST, generic, lucky, parse, prior
from sglang_dflash.worker.width.tiers import TIERS
from sglang_dflash.worker.width.turn import Turns

GREEDY, SAMPLED = 0, 1

# Averages over so many steps of one request each (a batch of 16 counts as 16).
RECENT = 100.0
UNSEEN = 500.0
LONG = 4000.0
TRUTH = 2000.0
TURNED = 15.0  # steps of the recent average that still count once the text has changed kind

# How many such steps the starting values are worth.
PRIOR_WORTH = 30.0
TRUTH_WORTH = 30.0
OWN_TRUTH_WORTH = 200.0
LUCK_WORTH = 20.0

# A batch is not as good as as many steps of one request: its texts may be in the same phase.
MOST_PER_STEP = 16.0

# Variances, relative: of one request's step about the average; of a block's quality at first, and its growth.
SPREAD = 0.3
QUALITY_FIRST, QUALITY_STEP = 0.10**2, 1e-6
LUCK_DOUBT = 0.25**2
TEXT_WANDERS = 0.1**2  # of the recent average about what the text is now


class Gains:
    """Expected tokens per request and step.

    Args:
        block: B, the drafter's greatest block.
        recalled: the longest chain of recalled text that steps report; 0 where nothing is recalled.
        accept, accept_sampled: what an evaluation of the drafter stored (``dflash_config.tree_accept`` and
            ``tree_accept_sampled``): tokens per pass by width, ``{"8x6": 2.25}``; empty where there was none.

    Raises UserError where a stored evaluation cannot be.
    """

    def __init__(
        self,
        block: int,
        accept: Mapping[str, float] | None = None,
        accept_sampled: Mapping[str, float] | None = None,
        *,
        recalled: int = 0,
    ) -> None:
        self._beyond = Beyond(recalled)
        self._turns = Turns()
        self.blocks = tuple(range(2, block + 1))
        self.version = 0
        self._deepest = max(block - 1, 1)
        greedy = parse(accept or {})
        starts = (greedy, parse(accept_sampled or {}) or greedy)
        shape = (2, len(TIERS), self._deepest)
        # Reach by (class, tier, depth), as the greatest block would have it: over a long time, and lately.
        self._long = np.zeros(shape)
        # What a shorter block's reach is of the greatest's: its tree's nodes all lie at its depths.
        self._short = np.zeros((len(self.blocks), *shape[1:]))
        for i, b in enumerate(self.blocks):
            of = np.maximum(generic(TIERS, self._deepest)[:, : b - 1], 1e-12)
            self._short[i, :, : b - 1] = generic(TIERS, b - 1) / of
            self._short[i, 0] = 0.0
        for c, start in enumerate(starts):
            self._long[c] = prior(TIERS, max(block, 2), start)
        self._long_weight = np.full(shape, PRIOR_WORTH)
        self._recent = np.zeros(shape)
        self._weight = np.zeros(shape)  # steps in the recent average
        self._by_block = np.zeros((2, len(self.blocks)))  # of those, by block
        self._quality = np.ones((2, len(self.blocks), self._deepest))
        self._unsure = np.full((2, len(self.blocks), self._deepest), QUALITY_FIRST)
        self._said = np.zeros((2, len(self.blocks), self._deepest))  # reach foretold and seen
        self._seen = np.zeros((2, len(self.blocks), self._deepest))
        self._power = np.ones(2)  # luck: reach is the long-run one to this power
        self._tokens: dict[int, np.ndarray] = {}

    # What steps show -----------------------------------------------------------------------------------

    def observe(
        self,
        width: Width,
        sampled: Sequence[bool],
        accepted: Sequence[int],
        mass: Any,
        held: np.ndarray | None = None,
    ) -> None:
        """One step's outcome.

        Args:
            width: the step's.
            sampled: per request, whether it draws its tokens.
            accepted: per request, the tokens it got from the pass, bonus included; 0 for one that had ended.
            mass: float [2 (greedy, sampled), T, L], nested lists or an array: summed over the requests of
                that class, the drafter's probability that the accepted path reaches depth d + 1 in the best
                tree of ``TIERS[t]`` nodes. T and L may be shorter than ours. None for a plain step.
            held: of the recalled chains, see :meth:`Beyond.observe`; None where nothing was recalled.
        """
        if width.plain or mass is None or width.block not in self.blocks:
            # The texts move on unseen: what was recent slowly counts for less.
            fade = math.exp(-min(len(accepted), MOST_PER_STEP) / UNSEEN)
            self._weight *= fade
            self._by_block *= fade
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
        self._beyond.observe(width, sampled, accepted, np.zeros((2, 0)) if held is None else held)
        self.version += 1
        self._tokens.clear()

    def _learn(self, c: int, i: int, width: Width, reach: np.ndarray, accepted: list[int]) -> None:
        depth = reach.shape[1]
        # Tiers with nothing at depth 1 were not computed; the plain tier never is.
        have = np.flatnonzero(reach[:, 0] > 0)
        if not len(have):
            return
        worth = min(float(len(accepted)) or 1.0, MOST_PER_STEP)
        own = have[min(int(np.searchsorted(np.take(TIERS, have), width.nodes)), len(have) - 1)]
        self._notice_turn(c, i, own, reach[own, 0], worth)
        self._learn_quality(c, i, own, reach[own], worth)
        scale = self._short[i, have, :depth] * self._quality[c, i, :depth]
        whole = np.where(scale > 0, reach[have] / np.maximum(scale, 1e-12), 0.0)  # as the greatest block's
        at = np.ix_(np.array([c]), have, np.arange(depth))
        mine = (scale > 0)[None] * worth
        fade = math.exp(-worth / RECENT)
        self._weight[c] *= fade
        self._by_block[c] *= fade
        self._by_block[c, i] += worth
        after = self._weight[at] + mine
        self._recent[at] += np.where(mine > 0, mine / np.maximum(after, 1e-12), 0.0) * (
            whole - self._recent[at]
        )
        self._weight[at] = after
        self._learn_luck(c, own)
        weight = self._long_weight[at]
        self._long[at] += mine / (weight + worth) * (whole - self._long[at])
        self._long_weight[at] = np.minimum(weight + mine, LONG)
        if accepted:
            keep = math.exp(-len(accepted) / TRUTH)
            self._said[c, i] *= keep
            self._seen[c, i] *= keep
            got = np.asarray(accepted)
            tiers = [TIERS[t] for t in have]
            for d in range(depth):
                said = float(np.interp(width.nodes, tiers, reach[have, d]))
                self._said[c, i, d] += len(accepted) * said
                self._seen[c, i, d] += float((got > d + 1).sum())

    def _notice_turn(self, c: int, i: int, tier: int, first: float, worth: float) -> None:
        """``first``: the chance said of depth 1."""
        known = float(self._weight[c, tier, 0])
        foretold = float(self._recent[c, tier, 0] * self._short[i, tier, 0] * self._quality[c, i, 0])
        if known < TURNED or foretold <= 1e-3:
            return
        if self._turns.observe(c, first / foretold - 1.0, worth):
            kept = np.minimum(1.0, TURNED / np.maximum(self._weight[c], 1e-12))
            self._weight[c] *= kept
            self._by_block[c] *= TURNED / max(known, TURNED)

    def _learn_quality(self, c: int, i: int, tier: int, reach: np.ndarray, worth: float) -> None:
        """Divide the surprise in one step's reach between the block and the text."""
        depth = len(reach)
        foretold = self._average(c)[tier, :depth] * self._short[i, tier, :depth] * self._quality[c, i, :depth]
        known = foretold > 1e-3
        surprise = np.where(known, reach / np.maximum(foretold, 1e-3) - 1.0, 0.0)
        noise = SPREAD * np.arange(1, depth + 1)
        unsure = np.minimum(self._unsure[c, i, :depth] + QUALITY_STEP * worth, QUALITY_FIRST)
        text = np.minimum(TEXT_WANDERS + noise / (1.0 + self._weight[c, tier, :depth]), LUCK_DOUBT)
        # An average made of this block's own steps tells nothing of it beside the others.
        total = float(self._by_block[c].sum())
        others = (total - float(self._by_block[c, i])) / (total + PRIOR_WORTH)
        share = np.where(known, others * unsure / (unsure + text + noise / worth), 0.0)
        moved = self._quality[c, i, :depth] * (1.0 + share * np.minimum(surprise, 5.0))
        self._quality[c, i, :depth] = np.clip(moved, 0.3, 2.0)
        self._unsure[c, i, :depth] = unsure * (1.0 - share)

    def _learn_luck(self, c: int, tier: int) -> None:
        recent, long = self._recent[c, tier, 0], self._long[c, tier, 0]
        now = math.log(min(max(recent, 1e-3), MOST)) / math.log(min(max(long, 1e-3), 0.999))
        weight = float(self._weight[c, tier, 0])
        share = weight / (weight + LUCK_WORTH)
        self._power[c] += share * (min(max(now, 0.3), 3.0) - self._power[c])

    @property
    def turns(self) -> int:
        """How often the text has changed kind."""
        return self._turns.count

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
            past = self._beyond.tokens(GREEDY, width) * (1.0 - sampled_share)
            past += self._beyond.tokens(SAMPLED, width) * sampled_share
            out.append(float(row[t] + share * (row[t - 1] - row[t])) + past)
        return out

    def doubt(self, block: int, sampled_share: float) -> tuple[float, float]:
        """Variances of the log of :meth:`tokens`: of this block beside others, of all beside plain steps."""
        c = SAMPLED if sampled_share > 0.5 else GREEDY
        own = float(self._unsure[c, self.blocks.index(block), 0])
        return own, LUCK_DOUBT / (1.0 + float(self._weight[c, :, 0].max()) / 4)

    def _table(self, c: int) -> np.ndarray:
        """[blocks, tiers]"""
        found = self._tokens.get(c)
        if found is None:
            found = self._tokens[c] = 1.0 + self._reach(c).sum(2)
        return found

    def _average(self, c: int) -> np.ndarray:
        """[tiers, depth], the greatest block's: what was seen lately, else the usual moved by luck."""
        usual = lucky(self._long[c], float(self._power[c]))
        weight = self._weight[c]
        return (self._recent[c] * weight + PRIOR_WORTH * usual) / (weight + PRIOR_WORTH)

    def _reach(self, c: int) -> np.ndarray:
        """[blocks, tiers, depth], put right by what happened."""
        right = self._quality[c] * self._truth(c)
        reach = np.minimum(self._average(c) * self._short * right[:, None, :], 1.0)
        # A deeper node needs the one above it; a wider tree holds the narrower one.
        reach = np.minimum.accumulate(reach, axis=2)
        return np.maximum.accumulate(reach, axis=1)

    def _truth(self, c: int) -> np.ndarray:
        """[blocks, depth]: seen over foretold. A block that was tried little leans on the others."""
        said, seen = self._said[c], self._seen[c]
        together = (seen.sum(0) + TRUTH_WORTH) / (said.sum(0) + TRUTH_WORTH)
        return np.clip((seen + OWN_TRUTH_WORTH * together) / (said + OWN_TRUTH_WORTH), 0.2, 3.0)

    # The other ranks -----------------------------------------------------------------------------------

    def _parts(self) -> tuple[np.ndarray, ...]:
        return (
            self._long, self._long_weight, self._recent, self._weight, self._by_block,
            self._quality, self._unsure, self._said, self._seen, self._power, *self._beyond.parts(),
            *self._turns.parts(),
        )  # fmt: skip

    def state(self) -> list[float]:
        return [float(self.version), *(x for part in self._parts() for x in part.ravel().tolist())]

    def load(self, state: Sequence[float]) -> None:
        """Raises ValueError where ``state`` is of other blocks."""
        parts = self._parts()
        if len(state) != 1 + sum(part.size for part in parts):
            raise ValueError("not the state of these gains")
        self.version, at = int(state[0]), 1
        for part in parts:
            part[...] = np.reshape(state[at : at + part.size], part.shape)
            at += part.size
        self._tokens.clear()
