"""The choice of a step's width: the most tokens per millisecond over all widths.

The objective has several maxima (costs are a staircase, and plain decoding stands apart), so every width is
weighed; nothing climbs.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sglang_dflash.errors import UserError
from sglang_dflash.step.width import PLAIN, Width
from sglang_dflash.worker.width.cost import CostTable
from sglang_dflash.worker.width.gain import Gains
from sglang_dflash.worker.width.tiers import tiers_up_to

# A block may be so much longer than the deepest path its tree has room for.
SPARE_ROWS = 1

# Rounds between weighings of the same load: few after a switch, more the longer it holds.
REFRESH_FIRST, REFRESH = 6, 32

# A switch must promise this much at once; the longer a width is in force, the less, down to the least.
MARGIN, MARGIN_LEAST, MARGIN_ROUNDS = 0.03, 0.015, 100.0

# Share of the time that probes may cost: at first, and when probes have long brought nothing.
PROBE_SHARE, PROBE_SHARE_LEAST = 0.01, 0.002
SURPRISE = 0.05  # drafting so much better at one weighing than at the last: probe as at first again
PROBE_GAP = 6  # rounds; a probe's outcome is known after two
PROBE_DOUBTS = 1.5  # a width is probed when so many standard deviations would make it the best
PROBE_LEAST = 0.02  # and be better by this
PROBE_DUTY = 4.0  # without such hope, when so many times its cost has been saved up
PROBE_SAVINGS = 400.0  # steps whose share may be saved up


class Policy(Protocol):
    """What chooses. ``choose`` is called once per scheduling round, before memory is checked."""

    def choose(self, requests: int, length: float, sampled_share: float) -> Width:
        """The width of the next decode step.

        Args:
            requests: that will be in it; prefills do not count.
            length: mean cached tokens of them.
            sampled_share: share of them that draw their tokens, 0..1.
        """
        ...

    def why(self) -> dict[str, Any]:
        """For ``/server_info``: the width in force, what is expected of it, and the steps at each width."""
        ...

    def state(self) -> list[float]:
        """For the other tensor-parallel ranks."""
        ...

    def load(self, state: Sequence[float]) -> None: ...


class FixedWidth:
    """The same width always."""

    def __init__(self, width: Width) -> None:
        self.width = width
        self._steps = 0

    def choose(self, requests: int, length: float, sampled_share: float) -> Width:
        self._steps += 1
        return self.width

    def why(self) -> dict[str, Any]:
        return {"policy": "fixed", "width": str(self.width), "steps": {str(self.width): 1.0}}

    def state(self) -> list[float]:
        return []

    def load(self, state: Sequence[float]) -> None:
        return


class RandomWidth:
    """Another width every step, for tests: n uniform in 1..N, b in 1..B; where either is 1 the step is plain.

    The same seed gives the same row of widths, whatever is asked for them.
    """

    def __init__(self, widest: Width, seed: int) -> None:
        self.widest = widest
        self._rng = random.Random(seed)
        self._now: Width | None = None
        self._counts: Counter[Width] = Counter()

    def choose(self, requests: int, length: float, sampled_share: float) -> Width:
        before = self._now
        while self._now == before:
            n, b = self._rng.randint(1, self.widest.nodes), self._rng.randint(1, self.widest.block)
            self._now = PLAIN if 1 in (n, b) else Width(n, b)
        assert self._now is not None
        self._counts[self._now] += 1
        return self._now

    def why(self) -> dict[str, Any]:
        return {"policy": "random", "width": str(self._now), "steps": _shares(self._counts)}

    def state(self) -> list[float]:
        return []

    def load(self, state: Sequence[float]) -> None:
        return


@dataclass
class _Choice:
    """What a load is decoded with.

    Attributes:
        since: round in which the width came into force.
        weighed: round of the last weighing.
        rival: the best rate of the other kind, plain or tree, over the choice's.
        ms: of its step.
        rates: tokens per request and ms of all candidates at that time, in their order.
        losses: ms that a step of each candidate would cost beyond what its tokens are worth.
        hopes: rates, with the doubt in them taken for the better.
    """

    at: int
    since: int
    weighed: int
    rival: float
    ms: float
    rates: list[float]
    losses: list[float]
    hopes: list[float]


class WidthPolicy:
    """Chooses by what steps cost and bring.

    Deterministic: the same calls and observations give the same widths.

    Args:
        widest: the greatest n and b.
        cost, gains: what the caller feeds with every step's outcome.
        max_rows: n x requests that wide steps may have, None for any; plain steps are always allowed.
        probe_share: of the time, that probes may cost.
    """

    def __init__(
        self,
        widest: Width,
        cost: CostTable,
        gains: Gains,
        *,
        max_rows: int | None = None,
        probe_share: float = PROBE_SHARE,
    ) -> None:
        self.cost, self.gains, self.max_rows = cost, gains, max_rows
        self.candidates: list[Width] = [PLAIN]
        for n in tiers_up_to(widest.nodes):
            self.candidates += [Width(n, b) for b in range(2, min(widest.block, n + SPARE_ROWS) + 1) if n > 1]
        self._index = {width: i for i, width in enumerate(self.candidates)}
        self._probe_share = self._share = probe_share
        self._round = 0
        self._turns, self._turned = gains.turns, 0  # changes of the text's kind, and the last one's round
        self._choices: dict[int, _Choice] = {}
        self._load: int | None = None
        self._savings = 0.0  # in steps' time: a probe's loss is divided by the step in force
        self._probed = -PROBE_GAP
        self._probe: Width | None = None
        self._counts: Counter[Width] = Counter()
        self._probes = 0
        self._last: tuple[int, float, float] = (1, 0.0, 0.0)

    def choose(self, requests: int, length: float, sampled_share: float) -> Width:
        self._round += 1
        load = _bucket(requests)
        choice = self._choices.get(load)
        if self.gains.turns != self._turns:
            self._turns, self._turned = self.gains.turns, self._round
        if choice is None or self._round - choice.weighed >= _interval(
            self._round - max(choice.since, self._turned)
        ):
            choice = self._choices[load] = self._weigh(choice, requests, length, sampled_share)
        self._load, self._last = load, (requests, length, sampled_share)
        width = self._probing(choice) or self.candidates[choice.at]
        self._counts[width] += 1
        return width

    def _weigh(self, before: _Choice | None, requests: int, length: float, share: float) -> _Choice:
        tokens = self.gains.of(self.candidates, share)
        most = self.max_rows or math.inf
        ms = [
            price if w.nodes == 1 or w.nodes * requests <= most else math.inf
            for w, price in zip(
                self.candidates, self.cost.all_ms(self.candidates, requests, length), strict=True
            )
        ]
        rates = [t / m for t, m in zip(tokens, ms, strict=True)]
        at = max(range(len(rates)), key=rates.__getitem__)
        since = self._round
        if before is not None and rates[before.at] > 0:
            held = self._round - before.since
            margin = MARGIN_LEAST + (MARGIN - MARGIN_LEAST) * math.exp(-held / MARGIN_ROUNDS)
            if rates[at] <= rates[before.at] * (1.0 + margin):
                at, since = before.at, before.since
            elif rates[at] > rates[before.at] * (1.0 + MARGIN):
                self._share = self._probe_share  # something paid: look again
        rival = max((r for i, r in enumerate(rates) if (i == 0) != (at == 0)), default=0.0) / rates[at]
        if before is not None and at == 0 and rival > before.rival * (1.0 + SURPRISE):
            self._share = self._probe_share  # drafting looks better than it did
        return _Choice(
            at,
            since,
            self._round,
            rival,
            ms[at],
            rates,
            [m - t / rates[at] for t, m in zip(tokens, ms, strict=True)],
            self._hopes(at, rates, requests, length, share),
        )

    def _hopes(self, at: int, rates: list[float], requests: int, length: float, share: float) -> list[float]:
        """The rates, with the doubt in how they compare to the choice's taken for the better."""
        price = self.cost.doubts(self.candidates, self.candidates[at], requests, length)
        of_block = {b: self.gains.doubt(b, share) for b in self.gains.blocks}
        now = self.candidates[at]
        hopes = []
        for rate, doubt, width in zip(rates, price, self.candidates, strict=True):
            if width.block != now.block:
                # A drafter of another block; and beside plain steps the text itself is in doubt.
                if width.nodes > 1:
                    doubt += of_block[width.block][0]
                if 1 in (width.nodes, now.nodes):
                    doubt += of_block[max(width.block, now.block)][1]
            hopes.append(rate * math.exp(PROBE_DOUBTS * math.sqrt(doubt)))
        return hopes

    def _probing(self, choice: _Choice) -> Width | None:
        """Another width to try in this round, or None."""
        self._savings = min(self._savings + self._share, self._share * PROBE_SAVINGS)
        if self._round - self._probed < PROBE_GAP or self._round - choice.since < PROBE_GAP:
            return None
        best, promise = None, choice.rates[choice.at] * (1.0 + PROBE_LEAST)
        for i, hope in enumerate(choice.hopes):
            if hope > promise and i != choice.at:
                best, promise = i, hope
        reserve = 1.0
        if best is None:
            # Hopeless by all that is known; but what is known of the text is old.
            others = [i for i in range(len(choice.rates)) if (i == 0) != (choice.at == 0)]
            if not others:
                return None
            best, reserve = max(others, key=choice.rates.__getitem__), PROBE_DUTY
        loss = max(choice.losses[best] / choice.ms, 0.005)
        if loss * reserve > self._savings:
            return None
        self._savings -= loss
        self._probed = self._round
        self._probes += 1
        self._share = max(self._share * 0.9, self._probe_share * PROBE_SHARE_LEAST / PROBE_SHARE)
        return self.candidates[best]

    def why(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            "policy": "auto",
            "steps": _shares(self._counts),
            "rounds": self._counts.total(),
            "probes": self._probes,
        }
        if self._load is None:
            return out | {"width": None}
        choice = self._choices[self._load]
        requests = self._last[0]
        rate, plain = choice.rates[choice.at] * requests, choice.rates[0] * requests
        return out | {
            "width": str(self.candidates[choice.at]),
            "requests": requests,
            "tokens_per_ms": round(rate, 4),
            "tokens_per_ms_plain": round(plain, 4),
            "gain": round(rate / plain, 3),
        }

    def state(self) -> list[float]:
        """What was observed, flat; the choice follows from it and from the calls of ``choose``."""
        cost, gains = self.cost.state(), self.gains.state()
        return [float(len(cost)), *cost, *gains]

    def load(self, state: Sequence[float]) -> None:
        """Take over another rank's observations. All ranks must do so in the same round."""
        split = 1 + int(state[0])
        self.cost.load(state[1:split])
        self.gains.load(state[split:])


def _shares(counts: Counter[Width]) -> dict[str, float]:
    total = sum(counts.values()) or 1
    return {str(width): round(count / total, 4) for width, count in counts.most_common()}


def _interval(held: int) -> int:
    """Rounds from one weighing to the next of a width that was held so long."""
    return min(REFRESH_FIRST + held // 4, REFRESH)


def _bucket(requests: int) -> int:
    """Loads that share a decision: exact up to 8, then eighths of a doubling."""
    return requests if requests <= 8 else round(8 * math.log2(requests)) - 16


_SHAPE = re.compile(r"(\d+)x(\d+)")
_RANDOM = re.compile(r"random:(\d+)")
SETTINGS = "auto, fixed, NxB such as 8x6 (1x1: never draft), or random:SEED"


def check_setting(setting: str, widest: Width) -> None:
    """Refuse a setting that :func:`make_policy` would refuse, before anything is loaded. Raises UserError."""
    _fixed_or_seed(setting, widest)


def make_policy(
    setting: str,
    widest: Width,
    cost: CostTable | None = None,
    gains: Gains | None = None,
    *,
    max_rows: int | None = None,
) -> Policy:
    """The policy of ``SGLANG_DFLASH_WIDTH``.

    Args:
        setting: ``auto``, ``fixed`` (the greatest n and b), ``NxB`` or ``random:SEED``.
        widest: the greatest n (``--speculative-num-draft-tokens``) and b (the drafter's block).
        cost, gains: for ``auto``; new ones, without measurements, where None.
        max_rows: as :class:`WidthPolicy` has it.

    Raises:
        UserError: an unknown setting, or a width that this server does not have.
    """
    found = _fixed_or_seed(setting, widest)
    if isinstance(found, Width):
        return FixedWidth(found)
    if found is not None:
        return RandomWidth(widest, found)
    return WidthPolicy(widest, cost or CostTable(), gains or Gains(widest.block), max_rows=max_rows)


def _fixed_or_seed(setting: str, widest: Width) -> Width | int | None:
    """A fixed width, a seed, or None for ``auto``."""
    if setting == "auto":
        return None
    if setting == "fixed":
        if widest.nodes < 2:
            raise UserError(
                f"SGLANG_DFLASH_WIDTH=fixed with {widest.nodes} draft token drafts nothing; set "
                "--speculative-num-draft-tokens to 2 or more"
            )
        return widest
    if found := _RANDOM.fullmatch(setting):
        if widest.nodes < 2 or widest.block < 2:
            raise UserError(
                f"SGLANG_DFLASH_WIDTH={setting} has only plain steps to draw from; raise N above 1"
            )
        return int(found[1])
    if found := _SHAPE.fullmatch(setting):
        width = Width(int(found[1]), int(found[2]))
        if width == PLAIN:
            return width
        if width.nodes < 2 or width.block < 2:
            raise UserError(
                f"SGLANG_DFLASH_WIDTH={setting} drafts nothing; write 2x2 or wider, or 1x1 for plain decoding"
            )
        if width.nodes > widest.nodes or width.block > widest.block:
            raise UserError(
                f"SGLANG_DFLASH_WIDTH={setting} is wider than {widest.nodes} nodes "
                f"(--speculative-num-draft-tokens) and a block of {widest.block} (the drafter's); narrow it"
            )
        return width
    raise UserError(f"SGLANG_DFLASH_WIDTH={setting!r} is no width; known: {SETTINGS}")
