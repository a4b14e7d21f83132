"""Filling the cost table from rehearsed steps."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from sglang_dflash.step.width import PLAIN, Width
from sglang_dflash.worker.width.cost import Cell, CostTable, load, save
from sglang_dflash.worker.width.learn import measure_costs
from sglang_dflash.worker.width.start import every_width, to_compile

WIDEST = Width(16, 6)
FINGERPRINT = {"target": "t", "device": "d"}


class Machine:
    """Steps with a known price, in seconds."""

    def __init__(self) -> None:
        self.ran: Counter[tuple[Width, int, int]] = Counter()

    def __call__(self, width: Width, requests: int, length: int) -> tuple[float, float, float]:
        self.ran[width, requests, length] += 1
        drafter = 0.0 if width.plain else 1e-6 * requests * width.block
        return drafter, 1e-5 * (10 + requests * width.nodes), 2e-6


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_DFLASH_CACHE", str(tmp_path))


def fill(machine: Machine, **more: object) -> CostTable:
    table = CostTable()
    options = {"most_requests": 32, "longest": 2048, "seconds": 5.0, "fingerprint": FINGERPRINT} | more
    measure_costs(table, machine, WIDEST, **options)  # type: ignore[arg-type]
    return table


def test_the_table_says_what_steps_took() -> None:
    table = fill(Machine())
    for width, requests in ((PLAIN, 1), (Width(8, 6), 1), (Width(4, 4), 4), (Width(2, 2), 16)):
        drafter = 0.0 if width.plain else 1e-3 * requests * width.block
        want = drafter + 1e-2 * (10 + requests * width.nodes) + 2e-3
        assert table.ms(width, requests, 256) == pytest.approx(want, rel=0.1), (width, requests)


def test_one_rehearsed_step_fills_several_cells() -> None:
    machine = Machine()
    table = fill(machine)
    both = [c for c in table.cells if (c.rows, c.requests, c.length) == (4, 1, 64) and c.what != "draft"]
    assert {c.what for c in both} == {"target", "rest"}
    assert machine.ran[Width(4, 4), 1, 64] <= 13  # a warm-up and twelve runs, not twice that
    assert all(not width.plain or width == PLAIN for width, _, _ in machine.ran)


def test_what_is_compiled_ahead_are_all_widths_and_every_tile_of_the_head() -> None:
    widths = every_width(WIDEST)
    assert PLAIN in widths
    assert widths[-1] == WIDEST
    assert {Width(n, b) for n in (6, 8, 12, 16) for b in range(2, 7)} < set(widths)
    steps = to_compile(widths, most_requests=64)
    assert {width for width, _, _ in steps} == set(widths)
    for sampled in (False, True):
        rows = {n * width.depth for width, n, draws in steps if width == WIDEST and draws == sampled}
        tiles = {16 if r <= 16 else 32 if r <= 32 else 64 for r in rows}
        assert tiles == {16, 32, 64}, rows
    assert all(n <= 3 for _, n, _ in to_compile([Width(2, 2)], most_requests=3))


def test_the_next_start_measures_nothing() -> None:
    first = fill(Machine())
    again = load(FINGERPRINT)
    assert again is not None
    assert again.cells == first.cells
    assert load(FINGERPRINT | {"device": "another"}) is None


def test_ranks_run_the_same_rehearsals() -> None:
    said: list[float] = []
    first = Machine()

    def speak(value: float) -> float:
        said.append(value)
        return value

    fill(first, agree=speak, seconds=0.02)
    heard = iter(said)
    second = Machine()
    # Another rank, with another clock and another budget gone: it follows what rank 0 said.
    fill(second, agree=lambda value: next(heard), seconds=0.02)
    assert first.ran == second.ran


class Busy(Machine):
    """A machine on which something else has the cores."""

    busy = True

    def __call__(self, width: Width, requests: int, length: int) -> tuple[float, float, float]:
        drafter, target, rest = super().__call__(width, requests, length)
        return drafter, target * (40.0 if self.busy and not width.plain else 1.0), rest


@pytest.mark.parametrize("measured", [True, False])
def test_a_busy_machine_is_measured_again_and_never_remembered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, measured: bool
) -> None:
    machine = Busy()

    def wait(seconds: float) -> None:
        machine.busy = not measured

    monkeypatch.setattr("sglang_dflash.worker.width.learn.time.sleep", wait)
    table = fill(machine, seconds=0.5)
    assert "busy machine: a target pass of " in caplog.text
    known = load(FINGERPRINT)
    if measured:
        assert known is not None
        assert known.cells == table.cells
        assert table.ms(Width(8, 6), 1, 64) < 3 * table.ms(PLAIN, 1, 64)
    else:
        assert known is None
        assert table.cells == []
        assert table.ms(Width(8, 6), 1, 64) < 8 * table.ms(PLAIN, 1, 64)


def test_a_table_of_a_busy_machine_is_not_read(caplog: pytest.LogCaptureFixture) -> None:
    """As an earlier version kept them."""
    cells = [
        Cell(what="target", rows=1, requests=1, length=64, ms=46.4),
        Cell(what="target", rows=2, requests=1, length=64, ms=996.0),
    ]
    save(CostTable(cells), FINGERPRINT)
    assert load(FINGERPRINT) is None
    assert "a target pass of 2 rows took 996 ms, a plain one 46); measuring again" in caplog.text
