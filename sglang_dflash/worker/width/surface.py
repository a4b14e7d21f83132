"""Milliseconds of a pass between the shapes that were measured."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping

# What an empty table says, so that a server whose measuring was cut short still decides and then learns:
# a pass that rows make dearer slowly.
UNKNOWN_MS, UNKNOWN_MS_PER_ROW = 10.0, 0.5


def isotonic(values: list[float]) -> list[float]:
    """The non-decreasing row nearest to ``values`` in squares (pool adjacent violators)."""
    blocks: list[list[float]] = []
    for value in values:
        blocks.append([value, 1.0])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, count = blocks.pop()
            low, size = blocks[-1]
            blocks[-1] = [(low * size + mean * count) / (size + count), size + count]
    return [mean for mean, count in blocks for _ in range(int(count))]


class Surface:
    """A sparse grid over (rows per request, requests): never falling, linear between cells and above them.

    A column is what was measured at one number of requests. Above its last cell a column grows as fast as
    its last two cells say, and at least as fast as the column before it does at as many rows in all: two
    cheap cells inside one tile say nothing about the next tile.

    Args:
        cells: (rows, requests) -> ms.
    """

    def __init__(self, cells: Mapping[tuple[int, int], float]) -> None:
        self.counts = sorted({requests for _, requests in cells})
        self.columns: list[tuple[list[int], list[float]]] = []
        for count in self.counts:
            rows = sorted(r for r, requests in cells if requests == count)
            self.columns.append((rows, isotonic([cells[r, count] for r in rows])))
        self._known: dict[tuple[float, int], float] = {}

    def at(self, rows: float, requests: int) -> float:
        key = (rows, requests)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._at(rows, requests)
        return found

    def _at(self, rows: float, requests: int) -> float:
        if not self.counts:
            return UNKNOWN_MS + UNKNOWN_MS_PER_ROW * rows * requests
        if len(self.counts) == 1:  # one column: as if all rows were one request's
            return self._column(0, rows * requests / self.counts[0])
        values = isotonic([self._column(i, rows) for i in range(len(self.counts))])
        i = min(max(bisect_right(self.counts, requests), 1), len(self.counts) - 1)
        low, high = self.counts[i - 1], self.counts[i]
        slope = (values[i] - values[i - 1]) / (high - low)
        value = values[i - 1] + slope * (requests - low)
        return value if requests >= self.counts[0] else max(value, 0.5 * values[0])

    def _column(self, i: int, rows: float) -> float:
        xs, ys = self.columns[i]
        if rows <= xs[0]:
            # Below the first cell: the line to it, never under half of what was measured.
            return max(ys[0] - self._slope(i, 0) * (xs[0] - rows), 0.5 * ys[0])
        if rows >= xs[-1]:
            return ys[-1] + self._slope(i, len(xs) - 1) * (rows - xs[-1])
        j = bisect_right(xs, rows)
        return ys[j - 1] + (ys[j] - ys[j - 1]) / (xs[j] - xs[j - 1]) * (rows - xs[j - 1])

    def _slope(self, i: int, at: int) -> float:
        """ms per row beyond cell ``at``, the first or the last, of column ``i``."""
        xs, ys = self.columns[i]
        own = 0.0
        if len(xs) > 1:
            j = max(at, 1)
            own = (ys[j] - ys[j - 1]) / (xs[j] - xs[j - 1])
        if at == 0 and len(xs) > 1:
            return own
        if i == 0:
            return own if len(xs) > 1 else UNKNOWN_MS_PER_ROW * self.counts[0] * ys[0] / UNKNOWN_MS / 4
        ratio = self.counts[i] / self.counts[i - 1]
        x = xs[at] * ratio
        before = self._column(i - 1, x + ratio) - self._column(i - 1, x)
        return max(own, before)
