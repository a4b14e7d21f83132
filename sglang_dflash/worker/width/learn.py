"""The cost table of this server, measured with rehearsed steps before the first request."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Protocol

from sglang_dflash.step.width import Width
from sglang_dflash.worker.width.cost import Cell, CostTable, What, measure, plan, save

logger = logging.getLogger("sglang_dflash")

SECONDS_CPU, SECONDS_CUDA = 10.0, 20.0


class Rehearses(Protocol):
    """Runs one step over requests that nobody sent: seconds of the drafter, the target and the rest."""

    def __call__(self, width: Width, requests: int, length: int) -> tuple[float, float, float]: ...


class _Parts:
    """A rehearsed step gives the times of three cells; each cell takes them once."""

    def __init__(self, rehearse: Rehearses, widest: Width) -> None:
        self._rehearse, self._widest = rehearse, widest
        self._known: dict[tuple, list[dict[What, float]]] = defaultdict(list)
        self._taken: dict[tuple, int] = defaultdict(int)

    def _width(self, cell: Cell) -> Width:
        if cell.what == "draft":
            return Width(2, cell.rows)
        return Width(cell.rows, 1 if cell.rows == 1 else min(max(cell.rows, 2), self._widest.block))

    def __call__(self, cell: Cell) -> float:
        """Milliseconds of the cell's part of a step."""
        step = (self._width(cell), cell.requests, cell.length)
        seen = self._taken[cell.what, step]
        if seen == len(self._known[step]):
            draft, target, rest = self._rehearse(*step)
            self._known[step].append({"draft": draft, "target": target, "rest": rest})
        self._taken[cell.what, step] += 1
        return 1e3 * self._known[step][seen][cell.what]


def measure_costs(
    table: CostTable,
    rehearse: Rehearses,
    widest: Width,
    *,
    most_requests: int,
    longest: int,
    seconds: float,
    fingerprint: Mapping[str, str],
    agree: Callable[[float], float] | None = None,
) -> None:
    """Fill an empty table and keep it for the next start.

    Args:
        table: of the policy.
        rehearse: see `Rehearses`.
        widest: the greatest n and b.
        most_requests, longest: what a rehearsal can have at most.
        seconds: how long it may take.
        fingerprint: what the times depend on.
        agree: gives every tensor-parallel rank rank 0's value, so that all run the same rehearsals.
    """
    run: Callable[[Cell], float] = _Parts(rehearse, widest)
    clock = time.perf_counter
    if agree is not None:
        alone, mine = run, clock
        run, clock = (lambda cell: agree(alone(cell))), (lambda: agree(mine()))
    cells = plan(widest, most_requests, longest)
    begin = time.perf_counter()
    done = measure(table, cells, run, seconds, clock=clock)
    logger.info(
        "measured %d of %d cells of the cost table in %.1f s; kept in %s",
        done,
        len(cells),
        time.perf_counter() - begin,
        save(table, fingerprint),
    )
