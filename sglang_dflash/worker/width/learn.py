"""The cost table of this server, measured with rehearsed steps before the first request."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from sglang_dflash.step.width import Width
from sglang_dflash.worker.width.cost import Cell, CostTable, What, contradiction, plan, save
from sglang_dflash.worker.width.measure import Run, measure

logger = logging.getLogger("sglang_dflash")

SECONDS_CPU, SECONDS_CUDA = 10.0, 20.0

# Measured again so often, after so many seconds, where the machine was busy with something else.
TRIES, PAUSE = 3, 5.0


class Rehearses(Protocol):
    """Runs one step over requests that nobody sent: seconds of the drafter, the target and the rest."""

    def __call__(self, width: Width, requests: int, length: int) -> tuple[float, float, float]: ...


class _Steps:
    """A rehearsed step shows the times of up to three planned cells."""

    def __init__(self, rehearse: Rehearses, widest: Width, cells: Sequence[Cell]) -> None:
        self._rehearse, self._widest, self._planned = rehearse, widest, set(cells)

    def _width(self, cell: Cell) -> Width:
        if cell.what == "draft":
            return Width(2, cell.rows)
        return Width(cell.rows, 1 if cell.rows == 1 else min(max(cell.rows, 2), self._widest.block))

    def __call__(self, cell: Cell) -> dict[Cell, float]:
        """Milliseconds of the cell's part of a step, and of the parts that other cells ask for."""
        width = self._width(cell)
        draft, target, rest = self._rehearse(width, cell.requests, cell.length)
        parts: list[tuple[What, int, float]] = [
            ("draft", width.block, draft),
            ("target", width.nodes, target),
            ("rest", width.nodes, rest),
        ]
        shown = {
            cell.model_copy(update={"what": what, "rows": rows}): 1e3 * seconds
            for what, rows, seconds in parts
        }
        return {of: ms for of, ms in shown.items() if of in self._planned}


def measure_costs(
    table: CostTable,
    rehearse: Rehearses,
    widest: Width,
    *,
    most_requests: int,
    longest: int,
    seconds: float,
    fingerprint: Mapping[str, str],
    agree: Callable[[Any], Any] | None = None,
) -> None:
    """Fill an empty table and keep it for the next start.

    Times that contradict each other are measured again; where they still do, the table stays empty and is not
    kept.

    Args:
        table: of the policy.
        rehearse: see `Rehearses`.
        widest: the greatest n and b.
        most_requests, longest: what a rehearsal can have at most.
        seconds: how long it may take.
        fingerprint: what the times depend on.
        agree: gives every tensor-parallel rank rank 0's value, so that all run the same rehearsals.
    """
    cells = plan(widest, most_requests, longest)
    for again in range(TRIES):
        if again:
            time.sleep(PAUSE)
        table.clear()
        begin = time.perf_counter()
        done = _measure(table, cells, _Steps(rehearse, widest, cells), seconds, agree)
        wrong = contradiction(table.cells)
        if wrong is None:
            logger.info(
                "measured %d of %d cells of the cost table in %.1f s; kept in %s",
                done,
                len(cells),
                time.perf_counter() - begin,
                save(table, fingerprint),
            )
            return
        logger.warning("the cost table was measured on a busy machine: %s", wrong)
    table.clear()
    logger.warning("no cost table this time: widths start from a guess, and steps correct it")


def _measure(
    table: CostTable,
    cells: Sequence[Cell],
    run: Run,
    seconds: float,
    agree: Callable[[Any], Any] | None,
) -> int:
    clock = time.perf_counter
    if agree is not None:
        alone, mine = run, clock
        run, clock = (lambda cell: agree(alone(cell))), (lambda: agree(mine()))
    return measure(table, cells, run, seconds, clock=clock)
