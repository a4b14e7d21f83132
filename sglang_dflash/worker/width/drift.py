"""How far steps served are from what the cost table says: the machine's speed apart from each width's own.

Three effects add up in the logarithm of a step's time: the machine's speed now (fast; a noisy minute), the
kind of step (plain or tree, by load) and the width itself (both slow). Each has a variance, and a surprise
is divided among them by their variances, as a Kalman filter with a diagonal covariance does: a width seen
often is known, so that a machine grown slower is blamed on the machine; a width seen for the first time
is not, so that the same surprise is blamed on the width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sglang_dflash.step.width import Width

# Variances of the logarithm, and how much each grows with a step.
SPEED_FIRST, SPEED_STEP = 0.3**2, 0.02**2
KIND_FIRST, KIND_STEP = 0.10**2, 0.0005**2
WIDTH_FIRST, WIDTH_STEP = 0.08**2, 0.0010**2
NOISE_FIRST, NOISE_LEAST, NOISE_MOST = 0.08**2, 0.01**2, 0.3**2
NOISE_RATE = 0.02
CLIP = 3.0  # standard deviations of a surprise that are believed

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
    """The three effects, learned from steps."""

    def __init__(self) -> None:
        self.steps = 0
        self.speed = _Effect(0.0, SPEED_FIRST, 0)
        self.noise = NOISE_FIRST
        self._accidents = 0
        self._kinds: dict[Key, _Effect] = {}
        self._widths: dict[Key, _Effect] = {}

    def look(self, width: Width, requests: int, length: float) -> tuple[float, float]:
        """(factor, doubt): what multiplies the measured time, and the standard deviation of its logarithm.

        The machine's speed is in the factor and not in the doubt: it is the same for every width.
        """
        kind, own = self._keys(width, requests, length)
        known, mine = self._kinds.get(kind), self._widths.get(own)
        value = self.speed.value + (known.value if known else 0.0)
        value += mine.value if mine else self._neighbour(own)
        variance = self._variance(known, KIND_FIRST, KIND_STEP) + self._variance(
            mine, WIDTH_FIRST, WIDTH_STEP
        )
        return math.exp(value), math.sqrt(variance)

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
        kind, own = self._keys(width, requests, length)
        if kind not in self._kinds:
            self._kinds[kind] = _Effect(0.0, KIND_FIRST, self.steps)
        if own not in self._widths:
            self._widths[own] = _Effect(self._neighbour(own), WIDTH_FIRST, self.steps)
        effects = (
            (self.speed, SPEED_FIRST, SPEED_STEP),
            (self._kinds[kind], KIND_FIRST, KIND_STEP),
            (self._widths[own], WIDTH_FIRST, WIDTH_STEP),
        )
        for effect, first, step in effects:
            effect.variance, effect.at = self._variance(effect, first, step), self.steps
        total = self.noise + sum(effect.variance for effect, _, _ in effects)
        limit = CLIP * math.sqrt(total)
        believed = min(max(surprise, -limit), limit)
        self.noise += NOISE_RATE * (believed * believed * self.noise / total - self.noise)
        self.noise = min(max(self.noise, NOISE_LEAST), NOISE_MOST)
        for effect, _, _ in effects:
            gain = effect.variance / total
            effect.value += gain * believed
            effect.variance *= 1.0 - gain
        return True

    def forget_speed(self) -> None:
        """Another day: the machine's speed is unknown, what was learned of widths stays."""
        self.speed = _Effect(0.0, SPEED_FIRST, self.steps)

    def state(self) -> list[float]:
        head = [float(self.steps), self.noise, float(self._accidents), float(len(self._kinds))]
        out = [*head, self.speed.value, self.speed.variance, float(self.speed.at)]
        for effects in (self._kinds, self._widths):
            for key, e in effects.items():
                out += [*map(float, key), e.value, e.variance, float(e.at)]
        return out

    def load(self, state: Sequence[float]) -> None:
        """Raises ValueError where ``state`` is none of :meth:`state`'s."""
        if len(state) < 7 or not all(map(math.isfinite, state)):
            raise ValueError("not the state of a cost table")
        kinds, rest = int(state[3]), list(state[7:])
        split = 5 * kinds
        if kinds < 0 or split > len(rest) or (len(rest) - split) % 7:
            raise ValueError("not the state of a cost table")
        self.steps, self.noise, self._accidents = int(state[0]), state[1], int(state[2])
        self.speed = _Effect(state[4], state[5], int(state[6]))
        self._kinds = _effects(rest[:split], 2)
        self._widths = _effects(rest[split:], 4)

    def _variance(self, effect: _Effect | None, first: float, step: float) -> float:
        if effect is None:
            return first
        return min(first, effect.variance + step * max(self.steps - effect.at, 1))

    def _neighbour(self, own: Key) -> float:
        """What an unseen width starts from: half of what the same one showed at a like load or length."""
        nodes, block, load, band = own
        for other in ((load, band - 1), (load, band + 1), (load - 1, band), (load + 1, band)):
            if (found := self._widths.get((nodes, block, *other))) is not None:
                return 0.5 * found.value
        return 0.0

    @staticmethod
    def _keys(width: Width, requests: int, length: float) -> tuple[Key, Key]:
        load = load_bucket(requests)
        return (width.plain, load), (width.nodes, width.block, load, length_band(length))


def _effects(flat: list[float], size: int) -> dict[Key, _Effect]:
    out = {}
    for at in range(0, len(flat), size + 3):
        key = tuple(int(x) for x in flat[at : at + size])
        value, variance, since = flat[at + size : at + size + 3]
        out[key] = _Effect(value, variance, int(since))
    return out
