"""What `sglang-dflash measure` makes of a cost table."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from sglang_dflash.cli import measure
from sglang_dflash.errors import UserError
from sglang_dflash.step.width import PLAIN, Width
from sglang_dflash.worker.width.cost import Cell, CostTable
from sglang_dflash.worker.width.gain import Gains

WIDEST = Width(8, 6)


def table(row_ms: float) -> CostTable:
    """A machine with 50 ms a pass and ``row_ms`` more for every row after the first of one request."""
    cells = [
        Cell(what="target", rows=n, requests=r, length=256, ms=50 + row_ms * (n * r - 1))
        for n in (1, 2, 4, 8)
        for r in (1, 4, 32)
    ]
    cells += [Cell(what="draft", rows=b, requests=r, length=256, ms=1.0) for b in (2, 6) for r in (1, 32)]
    return CostTable(cells)


def test_rates_are_tokens_over_time() -> None:
    gains = Gains(6, {"8x6": 2.25})
    found = measure.forecast(table(5.0), gains, WIDEST, 256, levels=(1, 32))
    assert found.rates[PLAIN][0] == pytest.approx(1e3 / 50, rel=1e-6)
    wide = 1e3 * gains.tokens(WIDEST, 0.0) / (50 + 7 * 5 + 1)
    assert found.rates[WIDEST][0] == pytest.approx(wide, rel=0.02)
    assert found.auto == [max(rates[i] for rates in found.rates.values()) for i in (0, 1)]


def test_free_rows_draft_and_dear_rows_do_not() -> None:
    gains = Gains(6, {"8x6": 2.25})
    assert measure.forecast(table(0.0), gains, WIDEST, 256).best[0].nodes > 4
    assert measure.forecast(table(500.0), gains, WIDEST, 256).best == [PLAIN] * 6


def test_the_picture_and_the_tables(tmp_path: Path) -> None:
    cost = table(5.0)
    found = measure.forecast(cost, Gains(6), WIDEST, 256)
    measure.plot(found, WIDEST, "a pair", tmp_path / "measure.png")
    assert (tmp_path / "measure.png").stat().st_size > 5000
    console = Console(width=160, record=True)
    console.print(measure.costs(cost, WIDEST, 256), measure.predictions(found, WIDEST))
    text = console.export_text()
    assert "50.0" in text
    assert "auto" in text
    assert f"{found.auto[0]:.1f}" in text


def test_wrong_words_are_one_line() -> None:
    with pytest.raises(UserError, match="--length"):
        measure.main(["--length", "0"])
