"""How far steps served are from what the cost table says: the machine's speed apart from each width's own.

Four effects add up in the logarithm of a step's time: the machine's speed now (fast; a noisy minute), the
kind of step (plain or tree, by load), its rows n, and its block (all slow). Each has a variance, and a
surprise is divided among them by their variances, as a Kalman filter with a diagonal covariance does: a width
seen often is known, so that a machine grown slower is blamed on the machine; a width seen for the first time
is not, so that the same surprise is blamed on the width. The target's pass is most of a step, so rows have an
effect of their own: what 4x3 shows counts for 4x4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sglang_dflash.step.width import Width

# Variances of the logarithm: at first, and how much each grows with a step. The machine's grows always, the
# others' only while other widths are in force: against a width in use the rest is uncertain, not itself.
SPEED_FIRST, SPEED_STEP = 0.3**2, 0.005**2
KIND_FIRST, KIND_STEP = 0.10**2, 0.0005**2
ROWS_FIRST, ROWS_STEP = 0.08**2, 0.0020**2
BLOCK_FIRST, BLOCK_STEP = 0.03**2, 0.0005**2
NOISE_FIRST, NOISE_LEAST, NOISE_MOST = 0.08**2, 0.01**2, 0.3**2
NOISE_RATE = 0.02
CLIP = 3.0  # standard deviations of a surprise that are believed

# Surprises that all point one way (their running mean, in standard deviations) are a jump of the speed, say a
# neighbour on the machine that woke up: its variance is raised to the last.
TREND_RATE, TREND_JUMP, SPEED_JUMP = 0.3, 1.3, 0.15**2

# A step beyond this times its prediction, or under its inverse, is an accident...
ACCIDENT = math.log(4.0)
# ... unless so many come in a row.
PERSISTS = 8

Key = tuple[int, ...]


def load_bucket(requests: int) -> int:
    """1, 2, 3-4, 5-8, 9-16, ... requests."""
    return max(requests - 1, 0).bit_length()


def length_band(length: float) -> int:
    """Up to 256, 1024, 4096, ... cached tokens."""
    return max(0, (int(length) // 256).bit_length() + 1) // 2


class _Effect:
    __slots__ = ("at", "value", "variance")

    def __init__(self, value: float, variance: float, at: int) -> None:
        self.value, self.variance, self.at = value, variance, at


class Drift:
    """The effects, learned from steps."""

    def __init__(self) -> None:
        self.steps = 0
        self.speed = _Effect(0.0, SPEED_FIRST, 0)
        self.noise = NOISE_FIRST
        self._accidents = 0
        self._trend = 0.0
        # By (plain, load), (n, load, band) and (n, b, load, band).
        self._kinds: dict[Key, _Effect] = {}
        self._rows: dict[Key, _Effect] = {}
        self._blocks: dict[Key, _Effect] = {}

    def look(self, width: Width, requests: int, length: float) -> tuple[float, float, float]:
        """(factor, doubt, doubt of the kind): what multiplies the measured time, and how sure that is.

        Doubts are variances of the logarithm: of this width beside others of its kind, and of plain beside
        tree steps. The machine's speed is in the factor and in neither: it is the same for every width.
        """
        load, band = load_bucket(requests), length_band(length)
        value, total = self.speed.value, 0.0
        rows = self._rows.get((width.nodes, load, band))
        value += rows.value if rows else self._neighbour((width.nodes, load, band))
        total += self._variance(rows, ROWS_FIRST, ROWS_STEP)
        if width.nodes > 1:
            block = self._blocks.get((width.nodes, width.block, load, band))
            value += block.value if block else 0.0
            total += self._variance(block, BLOCK_FIRST, BLOCK_STEP)
        kind = self._kinds.get((width.nodes == 1, load))
        value += kind.value if kind else 0.0
        return math.exp(value), total, self._variance(kind, KIND_FIRST, KIND_STEP)

    def observe(self, width: Width, requests: int, length: float, ms: float, measured: float) -> bool:
        """A step took ``ms`` where the table alone says ``measured``; False for an accident."""
        if not (ms > 0 and math.isfinite(ms)):
            return False
        surprise = math.log(ms / (measured * self.look(width, requests, length)[0]))
        if abs(surprise) > ACCIDENT:
            self._accidents += 1
            if self._accidents < PERSISTS:
                return False
            # Not an accident but another machine: start over from here.
            self.speed = _Effect(self.speed.value + surprise, SPEED_FIRST, self.steps)
            self._accidents = 0
            return True
        self._accidents = 0
        self.steps += 1
        effects = self._effects(width, load_bucket(requests), length_band(length))
        self.speed.variance = min(SPEED_FIRST, self.speed.variance + SPEED_STEP)
        for effect, first, step in effects:
            effect.variance, effect.at = self._variance(effect, first, step), self.steps
        total = self.noise + sum(effect.variance for effect, _, _ in effects)
        limit = CLIP * math.sqrt(total)
        believed = min(max(surprise, -limit), limit)
        self._trend += TREND_RATE * (believed / math.sqrt(total) - self._trend)
        if abs(self._trend) > TREND_JUMP:
            raised = max(SPEED_JUMP - self.speed.variance, 0.0)
            self.speed.variance += raised
            total += raised
            self._trend = 0.0
        self.noise += NOISE_RATE * (believed * believed * self.noise / total - self.noise)
        self.noise = min(max(self.noise, NOISE_LEAST), NOISE_MOST)
        for effect, _, _ in effects:
            gain = effect.variance / total
            effect.value += gain * believed
            effect.variance *= 1.0 - gain
        return True

    def _effects(self, width: Width, load: int, band: int) -> list[tuple[_Effect, float, float]]:
        """What a step of this width shows, with its first variance and its growth."""
        kind, rows = (width.nodes == 1, load), (width.nodes, load, band)
        if kind not in self._kinds:
            self._kinds[kind] = _Effect(0.0, KIND_FIRST, self.steps)
        if rows not in self._rows:
            self._rows[rows] = _Effect(self._neighbour(rows), ROWS_FIRST, self.steps)
        out = [
            (self.speed, SPEED_FIRST, 0.0),
            (self._kinds[kind], KIND_FIRST, KIND_STEP),
            (self._rows[rows], ROWS_FIRST, ROWS_STEP),
        ]
        if width.nodes > 1:
            block = (width.nodes, width.block, load, band)
            if block not in self._blocks:
                self._blocks[block] = _Effect(0.0, BLOCK_FIRST, self.steps)
            out.append((self._blocks[block], BLOCK_FIRST, BLOCK_STEP))
        return out

    def forget_speed(self) -> None:
        """Another day: the machine's speed is unknown, what was learned of widths stays."""
        self.speed = _Effect(0.0, SPEED_FIRST, self.steps)

    def state(self) -> list[float]:
        speed = [self.speed.value, self.speed.variance, float(self.speed.at)]
        out = [float(self.steps), self.noise, float(self._accidents), self._trend, *speed]
        for effects in (self._kinds, self._rows, self._blocks):
            out.append(float(len(effects)))
            for key, e in effects.items():
                out += [*map(float, key), e.value, e.variance, float(e.at)]
        return out

    def load(self, state: Sequence[float]) -> None:
        """Raises ValueError where ``state`` is none of :meth:`state`'s."""
        if not all(map(math.isfinite, state)):
            raise ValueError("not the state of a cost table")
        flat = iter(state)
        try:
            steps, noise, accidents, trend = int(next(flat)), next(flat), int(next(flat)), next(flat)
            speed = _Effect(next(flat), next(flat), int(next(flat)))
            tables = []
            for size in (2, 3, 4):
                table: dict[Key, _Effect] = {}
                for _ in range(int(next(flat))):
                    key = tuple(int(next(flat)) for _ in range(size))
                    table[key] = _Effect(next(flat), next(flat), int(next(flat)))
                tables.append(table)
        except (StopIteration, RuntimeError):  # a generator's StopIteration is a RuntimeError
            raise ValueError("not the state of a cost table") from None
        if next(flat, None) is not None:
            raise ValueError("not the state of a cost table")
        self.steps, self.noise, self._accidents, self.speed = steps, noise, accidents, speed
        self._trend = trend
        self._kinds, self._rows, self._blocks = tables

    def _variance(self, effect: _Effect | None, first: float, step: float) -> float:
        if effect is None:
            return first
        return min(first, effect.variance + step * max(self.steps - effect.at - 1, 0))

    def _neighbour(self, rows: Key) -> float:
        """What unseen rows start from: half of what the same ones showed at a like load or length."""
        n, load, band = rows
        for other in ((load, band - 1), (load, band + 1), (load - 1, band), (load + 1, band)):
            if (found := self._rows.get((n, *other))) is not None:
                return 0.5 * found.value
        return 0.0
