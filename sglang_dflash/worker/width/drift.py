"""How far steps served are from what the cost table says: the machine's speed apart from each width's own.

Four effects add up in the logarithm of a step's time: the machine's speed now (a noisy minute), what all
tree steps share (work that no measured pass had), the step's rows n and its block b. Most of a step is the
target's pass, so what 4x3 shows counts for 4x4. A Kalman filter keeps their values with the whole covariance:
a width long in force says only what speed and width are together, and the first step of another width then
says how the two compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from sglang_dflash.step.width import Width

# Variances of the logarithm: at first, and how much each grows with a step.
SPEED_FIRST, SPEED_STEP = 0.3**2, 0.005**2
TREES_FIRST = 0.10**2
ROWS_FIRST, ROWS_STEP = 0.08**2, 0.0007**2
BLOCK_FIRST = 0.03**2
NOISE_FIRST, NOISE_LEAST, NOISE_MOST = 0.08**2, 0.01**2, 0.3**2
NOISE_RATE = 0.02
CLIP = 3.0  # standard deviations of a surprise that are believed

# Surprises that all point one way (their running mean, in standard deviations) are a jump of the speed, say a
# neighbour on the machine that woke up: its variance is raised by the last.
TREND_RATE, TREND_JUMP, SPEED_JUMP = 0.3, 1.3, 0.15**2

# A step beyond this times its prediction, or under its inverse, is an accident...
ACCIDENT = math.log(4.0)
# ... unless so many come in a row.
PERSISTS = 8

SPEED = 0  # its place among a load's effects
KINDS = ("speed", "trees", "rows", "block")
FIRST = {"speed": SPEED_FIRST, "trees": TREES_FIRST, "rows": ROWS_FIRST, "block": BLOCK_FIRST}
STEP = {"speed": SPEED_STEP, "trees": 0.0, "rows": ROWS_STEP, "block": 0.0}

Name = tuple[str, int]


@lru_cache(maxsize=1024)
def effects_of(width: Width) -> tuple[Name, ...]:
    rows = ("rows", width.nodes)
    if width.nodes == 1:
        return (("speed", 0), rows)
    return (("speed", 0), ("trees", 0), rows, ("block", width.block))


def load_bucket(requests: int) -> int:
    """1, 2, 3-4, 5-8, 9-16, ... requests."""
    return max(requests - 1, 0).bit_length()


def length_band(length: float) -> int:
    """Up to 256, 1024, 4096, ... cached tokens."""
    return max(0, (int(length) // 256).bit_length() + 1) // 2


class _Load:
    """The effects at one load and band of lengths: the speed first, the others as they are met."""

    def __init__(self) -> None:
        self.places: dict[Name, int] = {("speed", 0): SPEED}
        self.value = np.zeros(1)
        self.covariance = np.full((1, 1), SPEED_FIRST)
        self._limits()

    def _limits(self) -> None:
        self._step = np.array([STEP[kind] for kind, _ in self.places])
        first = np.array([FIRST[kind] for kind, _ in self.places])
        self._most = np.maximum(2 * first, np.diag(self.covariance))

    def known(self, width: Width) -> list[int]:
        return [self.places[name] for name in effects_of(width) if name in self.places]

    def meet(self, width: Width, start: float, unsure: float) -> list[int]:
        """Places of all effects of a width; new rows begin at ``start``, with so much more variance."""
        for name in effects_of(width):
            if name not in self.places:
                self.places[name] = len(self.places)
                self.value = np.append(self.value, start if name[0] == "rows" else 0.0)
                self.covariance = np.pad(self.covariance, ((0, 1), (0, 1)))
                self.covariance[-1, -1] = FIRST[name[0]] + (unsure if name[0] == "rows" else 0.0)
                self._limits()
        return self.known(width)

    def grow(self) -> None:
        """A step goes by."""
        diagonal = np.einsum("ii->i", self.covariance)  # a view
        np.minimum(diagonal + self._step, self._most, out=diagonal)

    def fill(self, places: dict[Name, int], value: np.ndarray, covariance: np.ndarray) -> None:
        self.places, self.value, self.covariance = places, value, covariance
        self._limits()

    def set_speed(self, value: float, variance: float) -> None:
        self.value[SPEED] = value
        self.covariance[SPEED, :] = self.covariance[:, SPEED] = 0.0
        self.covariance[SPEED, SPEED] = variance


class Drift:
    """The effects, learned from steps.

    Args:
        unsure: (n, requests) -> variance of what the table says there beyond that of a measured cell.
    """

    def __init__(self, unsure: Callable[[int, int], float] = lambda n, requests: 0.0) -> None:
        self._unsure = unsure
        self.steps = 0
        self.noise = NOISE_FIRST
        self._accidents = 0
        self._trend = 0.0
        self._now = (-1, -1)  # the load that the speed was last seen at
        self._loads: dict[tuple[int, int], _Load] = {}

    def factor(self, width: Width, requests: int, length: float) -> float:
        """What multiplies the measured time."""
        return self.factors((width,), requests, length)[0]

    def factors(self, widths: Sequence[Width], requests: int, length: float) -> list[float]:
        load = self._at(requests, length)
        places, value = load.places, load.value.tolist()
        out = []
        for width in widths:
            total = 0.0
            for name in effects_of(width):
                if (at := places.get(name)) is not None:
                    total += value[at]
                elif name[0] == "rows":
                    total += self._neighbour(width.nodes, requests, length)
            out.append(math.exp(total))
        return out

    def doubts(self, widths: Sequence[Width], than: Width, requests: int, length: float) -> list[float]:
        """Variances of the logarithm of how the widths' times compare to that of ``than``."""
        load = self._at(requests, length)
        signs, unmet = np.zeros((len(widths), len(load.value))), np.zeros(len(widths))
        theirs = effects_of(than)
        for i, width in enumerate(widths):
            mine = effects_of(width)
            for names, others, sign in ((mine, theirs, 1.0), (theirs, mine, -1.0)):
                for name in names:
                    if name in others:
                        continue
                    if (at := load.places.get(name)) is None:
                        unmet[i] += FIRST[name[0]]
                        if name[0] == "rows":
                            unmet[i] += self._unsure(name[1], requests)
                    else:
                        signs[i, at] = sign
        met = np.einsum("ij,ij->i", signs @ load.covariance, signs)
        return (np.maximum(met, 0.0) + unmet).tolist()

    def observe(self, width: Width, requests: int, length: float, ms: float, measured: float) -> bool:
        """A step took ``ms`` where the table alone says ``measured``; False for an accident."""
        if not (ms > 0 and math.isfinite(ms)):
            return False
        surprise = math.log(ms / (measured * self.factor(width, requests, length)))
        if abs(surprise) > ACCIDENT:
            self._accidents += 1
            if self._accidents < PERSISTS:
                return False
            # Not an accident but another machine: start over from here.
            load = self._enter(requests, length)
            load.set_speed(float(load.value[SPEED]) + surprise, SPEED_FIRST)
            self._accidents = 0
            return True
        self._accidents = 0
        self.steps += 1
        load = self._enter(requests, length)
        n = width.nodes
        at = load.meet(width, self._neighbour(n, requests, length), self._unsure(n, requests))
        load.grow()
        ahead = load.covariance[at].sum(0)  # covariances of the step's time with every effect
        total = float(ahead[at].sum()) + self.noise
        limit = CLIP * math.sqrt(total)
        believed = min(max(surprise, -limit), limit)
        self._trend += TREND_RATE * (believed / math.sqrt(total) - self._trend)
        if abs(self._trend) > TREND_JUMP:
            load.covariance[SPEED, SPEED] += SPEED_JUMP
            ahead[SPEED] += SPEED_JUMP
            total += SPEED_JUMP
            self._trend = 0.0
        self.noise += NOISE_RATE * (believed * believed * self.noise / total - self.noise)
        self.noise = min(max(self.noise, NOISE_LEAST), NOISE_MOST)
        load.value += ahead * (believed / total)
        load.covariance -= np.outer(ahead, ahead / total)
        return True

    def forget_speed(self) -> None:
        """Another day: the machine's speed is unknown, what was learned of widths stays."""
        for load in self._loads.values():
            load.set_speed(0.0, SPEED_FIRST)

    def state(self) -> list[float]:
        out = [float(self.steps), self.noise, float(self._accidents), self._trend, *map(float, self._now)]
        for key, load in self._loads.items():
            out += [*map(float, key), float(len(load.places))]
            for kind, number in load.places:
                out += [float(KINDS.index(kind)), float(number)]
            out += load.value.tolist()
            out += load.covariance[np.triu_indices(len(load.places))].tolist()
        return out

    def load(self, state: Sequence[float]) -> None:
        """Raises ValueError where ``state`` is none of :meth:`state`'s."""
        flat = _Reader(state)
        steps, noise, accidents, trend, *now = flat.take(6)
        loads: dict[tuple[int, int], _Load] = {}
        while flat.left:
            requests, band, size = map(int, flat.take(3))
            names = flat.take(2 * size)
            places = {
                (KINDS[int(kind) % len(KINDS)], int(number)): i
                for i, (kind, number) in enumerate(zip(names[::2], names[1::2], strict=True))
            }
            value, upper = np.array(flat.take(size)), np.zeros((size, size))
            upper[np.triu_indices(size)] = flat.take(size * (size + 1) // 2)
            if len(places) != size or places.get(("speed", 0)) != SPEED:
                raise ValueError("not the state of a cost table")
            loads[requests, band] = load = _Load()
            load.fill(places, value, upper + np.triu(upper, 1).T)
        self.steps, self.noise, self._accidents, self._trend = int(steps), noise, int(accidents), trend
        self._now, self._loads = (int(now[0]), int(now[1])), loads

    def _at(self, requests: int, length: float) -> _Load:
        """The effects at a load, with the machine's speed as it was last seen. A new one is not kept."""
        load = self._loads.get((load_bucket(requests), length_band(length))) or _Load()
        last = self._loads.get(self._now, load)
        if last is not load and load.value[SPEED] != last.value[SPEED]:
            load.set_speed(float(last.value[SPEED]), float(last.covariance[SPEED, SPEED]))
        return load

    def _enter(self, requests: int, length: float) -> _Load:
        load = self._at(requests, length)
        self._now = load_bucket(requests), length_band(length)
        self._loads[self._now] = load
        return load

    def _neighbour(self, n: int, requests: int, length: float) -> float:
        """What unseen rows start from: half of what the same ones showed at a like load or length."""
        bucket, band = load_bucket(requests), length_band(length)
        for key in ((bucket, band - 1), (bucket, band + 1), (bucket - 1, band), (bucket + 1, band)):
            load = self._loads.get(key)
            if load is not None and (at := load.places.get(("rows", n))) is not None:
                return 0.5 * float(load.value[at])
        return 0.0


class _Reader:
    def __init__(self, state: Sequence[float]) -> None:
        if not all(map(math.isfinite, state)):
            raise ValueError("not the state of a cost table")
        self._state, self._at = list(state), 0

    @property
    def left(self) -> int:
        return len(self._state) - self._at

    def take(self, count: int) -> list[float]:
        if not 0 < count <= self.left:
            raise ValueError("not the state of a cost table")
        self._at += count
        return self._state[self._at - count : self._at]
