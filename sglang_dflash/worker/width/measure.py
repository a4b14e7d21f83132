"""Fill a cost table from real passes, on a machine that may be busy with something else now and then."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from sglang_dflash.worker.width.cost import Cell, CostTable

logger = logging.getLogger("sglang_dflash")

# Share of the time to measure that may go to cells for the first time.
FIRST_ROUND = 0.45

# Seconds after which the reference is run again.
LOOK = 0.2

# So much more than at its best, as a share, may the reference take by chance.
STEADY = 0.06

# So much dearer than a greater cell, as a share, may a cell be by chance.
DEARER = 0.02

# Runs the cell's pass once: its milliseconds, and those of other cells that the same step shows.
Run = Callable[[Cell], Mapping[Cell, float]]


def measure(
    table: CostTable,
    cells: Sequence[Cell],
    run: Run,
    seconds: float,
    *,
    repeats: int = 12,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Measure as many of the planned ``cells`` as ``seconds`` allow; the number of cells measured.

    First, in at most 0.45 of the time, every cell runs once. Then, until the time is up, runs a cell that ran
    once; where there is none, one that has no quiet run (`Runs`), then the cell that is dearest beside those
    of more rows or requests, which cannot be cheaper, then the cell that had the least time so far. So cheap
    passes, whose differences are small, are measured more often. The first cell is the reference for the
    machine's speed. A cell that would take longer than what is left is passed over.

    Args:
        repeats: the most runs of a cell after its first.
    """
    start = clock()
    runs = Runs(run, cells[0], clock)
    spent: dict[Cell, float] = {}  # seconds, set-up included

    def once(cell: Cell) -> None:
        begin = clock()
        runs.once(cell)
        spent[cell] = spent.get(cell, 0.0) + clock() - begin

    for cell in cells:
        expected = 1e-3 * table.part(cell.what, cell.rows, cell.requests, cell.length) if spent else 0.0
        if not runs.of(cell) and clock() - start + expected < FIRST_ROUND * seconds:
            once(cell)
            runs.fill(table, [cell])
    again = [cell for cell in cells if runs.of(cell)]
    while again:
        prices = {cell: runs.price(cell) for cell in again}

        def urgency(cell: Cell, prices: Mapping[Cell, float] = prices) -> tuple[bool, bool, float, float]:
            dear = _too_dear(cell, prices)
            return runs.of(cell) == 1, not runs.quiet(cell), dear, -spent.get(cell, 0.0)

        cell = max(again, key=urgency)
        expected = spent.get(cell, 1e-3 * prices[cell]) / runs.of(cell)
        if runs.of(cell) > repeats or clock() - start + expected > seconds:
            again.remove(cell)
        else:
            once(cell)
    runs.fill(table, cells)
    return sum(runs.of(cell) > 0 for cell in cells)


class Runs:
    """Times of cells, each beside what the reference took shortly before and after it.

    Noise comes in spells in which all passes take longer. A run is quiet where both references around it took
    about as long as at the machine's best. Of a cell that has a quiet run the shortest of all its runs
    counts, for a first one, or what else the machine did, only adds. Of another one what is the spell's and
    not the cell's is divided out first: what both references around a run are above the best.
    """

    def __init__(self, run: Run, reference: Cell, clock: Callable[[], float]) -> None:
        self._run, self._reference, self._clock = run, reference, clock
        self._references: list[float] = []
        self._best = 0.0  # the least of a fifth of them: the least of all would be luck
        self._looked = float("-inf")
        self._seen: dict[Cell, list[tuple[float, int]]] = {}

    def of(self, cell: Cell) -> int:
        """How many there are."""
        return len(self._seen.get(cell, ()))

    def once(self, cell: Cell) -> None:
        """One more of the cell, and of what else its step shows."""
        if self._clock() - self._looked > LOOK:
            took = self._run(self._reference).get(self._reference, 0.0)
            if took > 0:
                self._references.append(took)
                self._best = sorted(self._references)[len(self._references) // 5]
            self._looked = self._clock()
        for shown, ms in self._run(cell).items():
            if ms > 0:
                self._seen.setdefault(shown, []).append((ms, len(self._references)))
            else:
                logger.warning("%s took %g ms by the clock; left out of the cost table", shown, ms)

    def price(self, cell: Cell) -> float:
        """Milliseconds of a cell that has run."""
        if self.quiet(cell):
            return min(ms for ms, _ in self._seen[cell])
        return min(ms / min(self._slow(after)) for ms, after in self._seen[cell])

    def quiet(self, cell: Cell) -> bool:
        """Whether one of its runs is."""
        return any(max(self._slow(after)) <= 1.0 + STEADY for _, after in self._seen[cell])

    def _slow(self, after: int) -> list[float]:
        """How much slower than at its best the machine was at the references before and at ``after``."""
        around = self._references[max(after - 1, 0) : after + 1]
        return [max(took / self._best, 1.0) for took in around] or [1.0]

    def fill(self, table: CostTable, cells: Iterable[Cell]) -> None:
        for cell in cells:
            if self.of(cell):
                table.add(cell.model_copy(update={"ms": self.price(cell)}))


def _too_dear(cell: Cell, prices: Mapping[Cell, float]) -> float:
    """By how much, as a share, a cell is dearer than the cheapest that has no fewer rows and requests."""
    least = min(
        price
        for other, price in prices.items()
        if (other.what, other.length) == (cell.what, cell.length)
        and other.rows >= cell.rows
        and other.requests >= cell.requests
    )
    return max(prices[cell] / least - 1.0 - DEARER, 0.0)
