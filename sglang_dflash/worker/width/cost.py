"""What a decode step costs: a table measured on the user's machine, corrected by the steps served."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sglang_dflash.errors import UserError
from sglang_dflash.models.cache import cache_root, make_dir
from sglang_dflash.step.width import Width
from sglang_dflash.worker.width.drift import Drift
from sglang_dflash.worker.width.surface import Surface
from sglang_dflash.worker.width.tiers import TIERS

logger = logging.getLogger(__name__)

# Standard deviation of the log of a price a doubling of rows or of requests away from the next measured
# cell, and the greatest.
FAR, MOST_FAR = 0.06, 0.3

# A pass of n rows that took so many times n plain passes was not measured alone.
ABSURD = 2.0

What = Literal["target", "draft", "rest"]


class Cell(BaseModel):
    """One thing to measure, or measured.

    Attributes:
        what: a target pass of ``rows`` = n rows a request (1: plain decoding, with its own kernels), a
            drafter pass with its head of ``rows`` = b rows, or the rest of a step (tree, acceptance, commit,
            host) of n = ``rows`` (1: of a plain step, the projection of its features included).
        requests: requests in the batch.
        length: cached tokens of each.
        ms: None where it is still to be measured.
    """

    model_config = ConfigDict(frozen=True)

    what: What
    rows: int = Field(ge=1)
    requests: int = Field(ge=1)
    length: int = Field(ge=0)
    ms: float | None = Field(None, gt=0, allow_inf_nan=False)


def plan(widest: Width, most_requests: int, longest: int, length: int = 64) -> list[Cell]:
    """What to measure at start, the most important first: a caller may stop anywhere.

    Args:
        widest: the greatest n and b.
        most_requests: the greatest batch.
        longest: the greatest context; a pass's price by length is taken from two lengths.
        length: cached tokens that most cells are measured at: few, for the price of more is not a line, and
            what lies between two lengths is known better than what lies below both.
    """
    near = max(1, min(length, longest // 16))
    far = min(16 * near, longest)
    loads = sorted({min(r, most_requests) for r in (1, 4, 16, 64, 256, most_requests)})
    tiers = [n for n in TIERS if n < widest.nodes] + [widest.nodes]
    main = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n < widest.nodes] + [widest.nodes]
    cells: list[Cell] = []

    def ask(what: What, rows: int, requests: int, at: int = near) -> None:
        cell = Cell(what=what, rows=rows, requests=requests, length=at, ms=None)
        if cell not in cells:
            cells.append(cell)

    def ask_greatest(loads: Sequence[int]) -> None:
        for requests in loads:
            for n in [n for n in main if n <= 4]:
                ask("target", n, requests)
            for b in sorted({2, widest.block}):
                ask("draft", b, requests)

    # What decides whether to draft at all, at every load that is likely; then how wide; then the price by
    # length; 8 requests; great loads; the tiers between; and at last the greatest loads, where one pass takes
    # long.
    for requests, most in zip(loads[:3], (8, 4, 2), strict=False):
        for n in [n for n in main if n <= max(most, main[0])]:
            ask("target", n, requests)
        for b in sorted({2, widest.block}):
            ask("draft", b, requests)
    for requests, most in zip(loads[:3], (128, 16, 4), strict=False):
        for n in [n for n in main if n <= most or requests == 1]:
            ask("target", n, requests)
    for n in (1, min(4, widest.nodes)):
        ask("target", n, loads[min(1, len(loads) - 1)], far)
    ask("draft", widest.block, loads[min(1, len(loads) - 1)], far)
    for requests in loads[:3]:  # each takes a whole step
        ask("rest", 1, requests)
        ask("rest", min(4, widest.nodes), requests)
    # Between the main loads a pass's price is no line, and here drafting stops to pay on a CPU.
    if loads[-1] > 8:
        for n in [n for n in main if n <= 4]:
            ask("target", n, 8)
        ask("draft", 2, 8)
    ask_greatest(loads[3:4])
    for requests in sorted({min(r, most_requests) for r in (1, 2, 4, 8, 16, 32)}):
        for n in [n for n in tiers if n * requests <= 4 * widest.nodes]:
            ask("target", n, requests)
    ask_greatest(loads[4:])
    return cells


class CostTable:
    """Predicted milliseconds of a decode step.

    A prediction is the measured passes' (:class:`Surface`, price by cached length linear) times what the
    steps served have shown since (:class:`Drift`).

    Args:
        cells: what was measured.
        captured: n -> batch sizes with a captured graph, ascending: a batch pays for the next size that has
            one. None where nothing pads.
        shared: predictions change only by :meth:`load`, not by :meth:`observe`: tensor-parallel ranks, whose
            clocks differ, all load what rank 0's :meth:`state` says at the same step and so decide alike.
    """

    def __init__(
        self,
        cells: Iterable[Cell] = (),
        *,
        captured: Mapping[int, Sequence[int]] | None = None,
        shared: bool = False,
    ) -> None:
        self._cells: list[Cell] = []
        self._captured = {n: tuple(sizes) for n, sizes in (captured or {}).items()}
        self._shared = shared
        self._live = Drift(self._unsure)
        self._said = Drift(self._unsure) if shared else self._live
        self._stale = True
        for cell in cells:
            self.add(cell)

    @property
    def cells(self) -> list[Cell]:
        """The measured cells."""
        return list(self._cells)

    def add(self, cell: Cell) -> None:
        """A measured cell; a second measurement of the same one replaces the first."""
        if cell.ms is None:
            raise ValueError(f"{cell} holds no measurement")
        same = ("what", "rows", "requests", "length")
        self._cells = [c for c in self._cells if any(getattr(c, k) != getattr(cell, k) for k in same)]
        self._cells.append(cell)
        self._stale = True

    def clear(self) -> None:
        """Forget what was measured."""
        self._cells = []
        self._stale = True

    # What a step costs ---------------------------------------------------------------------------------

    def ms(self, width: Width, requests: int, length: float) -> float:
        """Predicted milliseconds of one decode step.

        Args:
            width: the step's.
            requests: in the batch.
            length: mean cached tokens of its requests.
        """
        return self.measured(width, requests, length) * self._said.factor(width, requests, length)

    def all_ms(self, widths: Sequence[Width], requests: int, length: float) -> list[float]:
        """:meth:`ms` of many widths at once."""
        factors = self._said.factors(widths, requests, length)
        return [self.measured(w, requests, length) * f for w, f in zip(widths, factors, strict=True)]

    def doubts(self, widths: Sequence[Width], than: Width, requests: int, length: float) -> list[float]:
        """Variances of the logarithm of each width's :meth:`ms` over that of ``than``."""
        return self._said.doubts(widths, than, requests, length)

    def measured(self, width: Width, requests: int, length: float) -> float:
        """What the measured passes alone say, in ms."""
        if self._stale:
            self._rebuild()
        line = self._lines.get((width, requests))
        if line is None:
            line = self._lines[width, requests] = self._line(width, requests)
        base, slope = line
        return max(base + slope * (length - self._length), 0.25 * base)

    def _line(self, width: Width, requests: int) -> tuple[float, float]:
        """ms of a step at the length that most cells have, and ms per cached token."""
        asked: list[tuple[What, int]] = [("target", width.nodes), ("rest", width.nodes)]
        if width.nodes > 1 and width.block > 1:
            asked.append(("draft", width.block))
        parts = [self._part(what, rows, requests) for what, rows in asked]
        return sum(base for base, _ in parts), sum(slope for _, slope in parts)

    def part(self, what: What, rows: int, requests: int, length: float) -> float:
        """Milliseconds of a part of a step, by the measured passes alone."""
        if self._stale:
            self._rebuild()
        base, slope = self._part(what, rows, requests)
        return max(base + slope * (length - self._length), 0.25 * base)

    def _part(self, what: What, rows: int, requests: int) -> tuple[float, float]:
        if what == "target" and rows in self._captured:
            requests = next((size for size in self._captured[rows] if size >= requests), requests)
        plain = what != "draft" and rows == 1
        base = self._plain(what, requests) if plain else self._surfaces[what].at(rows, requests)
        fixed, per_row = self._slopes[what, plain]
        return base, (fixed + per_row * rows) * requests

    def _unsure(self, n: int, requests: int) -> float:
        """Variance of the log of a target pass's price for being away from every measured one."""
        if self._stale:
            self._rebuild()
        known = self._far.get((n, requests))
        if known is None:
            cells = [c for c in self._cells if c.what == "target" and (c.rows == 1) == (n == 1)]
            far = [abs(math.log2(n / c.rows)) + abs(math.log2(requests / c.requests)) for c in cells]
            known = self._far[n, requests] = min(FAR * min(far, default=MOST_FAR), MOST_FAR) ** 2
        return known

    def _plain(self, what: What, requests: int) -> float:
        plain, trees = self._plains[what], self._surfaces[what]
        if what == "rest" or len(plain.counts) > 1:
            return plain.at(1, requests)
        if not plain.counts:
            return trees.at(1, requests)
        # Measured at one load only: it grows with the load as trees do.
        at = plain.counts[0]
        return plain.at(1, at) * trees.at(2, requests) / trees.at(2, at)

    def _rebuild(self) -> None:
        lengths = [c.length for c in self._cells if c.what == "target"] or [0]
        self._length = max(set(lengths), key=lengths.count)
        self._lines: dict[tuple[Width, int], tuple[float, float]] = {}
        self._far: dict[tuple[int, int], float] = {}
        self._slopes: dict[tuple[What, bool], tuple[float, float]] = {}
        self._surfaces: dict[What, Surface] = {}
        self._plains: dict[What, Surface] = {}
        whats: tuple[What, ...] = ("target", "draft", "rest")
        for what in whats:
            grids = []
            for plain in (False, True):
                mine = [
                    c for c in self._cells if c.what == what and (what != "draft" and c.rows == 1) == plain
                ]
                self._slopes[what, plain] = fixed, per_row = _length_slope(mine, not plain)
                grid: dict[tuple[int, int], list[float]] = {}
                for c in mine:
                    assert c.ms is not None
                    away = (fixed + per_row * c.rows) * c.requests * (c.length - self._length)
                    grid.setdefault((c.rows, c.requests), []).append(max(c.ms - away, 0.25 * c.ms))
                grids.append({key: sum(values) / len(values) for key, values in grid.items()})
            if what == "rest" and not (grids[0] or grids[1]):
                grids = [{(1, 1): 0.0, (2, 1): 0.0}] * 2
            self._surfaces[what] = Surface(grids[0] or grids[1])
            self._plains[what] = Surface(grids[1] or (grids[0] if what == "rest" else {}))
        self._stale = False

    # What steps show -----------------------------------------------------------------------------------

    def observe(self, width: Width, requests: int, length: float, ms: float) -> bool:
        """A step took ``ms``. False where that was taken for an accident (a hang, a clock that jumped)."""
        return self._live.observe(width, requests, length, ms, self.measured(width, requests, length))

    def state(self) -> list[float]:
        """What steps have taught, for :meth:`load` on the other ranks or after a restart."""
        return self._live.state()

    def load(self, state: Sequence[float]) -> None:
        """Predict from another table's :meth:`state` from now on."""
        self._live.load(state)
        if self._shared:
            self._said.load(state)

    def forget_speed(self) -> None:
        """The machine's speed of another day says nothing of today's."""
        self._live.forget_speed()
        if self._shared:
            self._said.forget_speed()


def _length_slope(cells: list[Cell], by_rows: bool) -> tuple[float, float]:
    """(ms per request, ms per request and row) of one more cached token; neither is below 0.

    From shapes that were measured at two lengths, by least squares.
    """
    shapes: dict[tuple[int, int], list[Cell]] = {}
    for c in cells:
        shapes.setdefault((c.rows, c.requests), []).append(c)
    points = []
    for (rows, requests), same in shapes.items():
        first, last = (pick(same, key=lambda c: c.length) for pick in (min, max))
        if last.length > first.length:
            assert first.ms is not None
            assert last.ms is not None
            points.append((rows, (last.ms - first.ms) / (last.length - first.length) / requests))
    if not points:
        return 0.0, 0.0
    mean = sum(y for _, y in points) / len(points)
    center = sum(x for x, _ in points) / len(points)
    spread = sum((x - center) ** 2 for x, _ in points)
    per_row = sum((x - center) * y for x, y in points) / spread if by_rows and spread else 0.0
    per_row = max(per_row, 0.0)
    fixed = mean - per_row * center
    if fixed < 0:
        squares = sum(x * x for x, _ in points)
        return 0.0, max(sum(x * y for x, y in points) / squares, 0.0)
    return fixed, per_row


def contradiction(cells: Iterable[Cell]) -> str | None:
    """What in measured cells cannot be, in words: n rows never take much longer than n plain passes.

    Where it seems to, something else had the cores: two threads beside a busy process are 20 times slower.
    """
    known = {(c.what, c.rows, c.requests, c.length): c.ms for c in cells if c.ms is not None}
    for (what, rows, requests, length), ms in known.items():
        plain = known.get(("target", 1, requests, length))
        if plain is not None and what != "rest" and rows > 1 and ms > ABSURD * rows * plain:
            return f"a {what} pass of {rows} rows took {ms:.0f} ms, a plain one {plain:.0f}"
    return None


class CostFile(BaseModel):
    """A cost table on disk: ``<cache>/width/<hash of the fingerprint>.json``.

    Attributes:
        fingerprint: what the times depend on: model, drafter, dtype, device, parallelism, backend, versions.
        drift: :meth:`CostTable.state`.
    """

    format: Literal[1] = 1
    fingerprint: dict[str, str]
    cells: list[Cell] = Field(min_length=1)
    drift: list[float] = []

    @staticmethod
    def path(fingerprint: Mapping[str, str]) -> Path:
        text = json.dumps(dict(fingerprint), sort_keys=True)
        return cache_root() / "width" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def save(table: CostTable, fingerprint: Mapping[str, str]) -> Path | None:
    """Store a table; None, with one line in the log, where the cache cannot be written."""
    path = CostFile.path(fingerprint)
    content = CostFile(fingerprint=dict(fingerprint), cells=table.cells, drift=table.state())
    try:
        make_dir(path.parent)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(content.model_dump_json(indent=1))
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except (OSError, UserError) as error:
        logger.warning("cost table not kept, the next start measures again: %s", error)
        return None
    return path


def load(
    fingerprint: Mapping[str, str],
    *,
    captured: Mapping[int, Sequence[int]] | None = None,
    shared: bool = False,
) -> CostTable | None:
    """The stored table of ``fingerprint``; None where there is none, or, with one line, none of use."""
    path = CostFile.path(fingerprint)
    try:
        found = CostFile.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError, ValueError) as error:
        logger.warning("cost table %s is damaged (%s); measuring again", path, type(error).__name__)
        return None
    if found.fingerprint != dict(fingerprint):
        differs = sorted(
            k for k in {*found.fingerprint, *fingerprint} if found.fingerprint.get(k) != fingerprint.get(k)
        )
        logger.warning("cost table %s is of another %s; measuring again", path, ", ".join(differs))
        return None
    if any(c.ms is None for c in found.cells):
        logger.warning("cost table %s is damaged (a cell without its time); measuring again", path)
        return None
    if wrong := contradiction(found.cells):
        logger.warning("cost table %s was measured on a busy machine (%s); measuring again", path, wrong)
        return None
    table = CostTable(found.cells, captured=captured, shared=shared)
    if found.drift:
        try:
            table.load(found.drift)
        except ValueError:
            logger.warning("cost table %s: what steps had taught is damaged; starting from its passes", path)
        else:
            table.forget_speed()
    return table
