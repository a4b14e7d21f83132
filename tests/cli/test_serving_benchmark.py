"""The benchmark's arithmetic, its file of rows, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import serving  # noqa: E402


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=40), st.floats(0, 1))
def test_percentile_is_numpys(values: list[float], share: float) -> None:
    assert serving.percentile(values, share) == pytest.approx(
        numpy.quantile(values, share), rel=1e-9, abs=1e-9
    )


def test_percentiles_are_in_milliseconds() -> None:
    found = serving.percentiles([0.010, 0.020, 0.030])
    assert found is not None
    assert found.p50 == pytest.approx(20.0)
    assert serving.percentiles([]) is None


def row(setup: str = "a", method: str = "plain", level: int = 1, **more: object) -> serving.Row:
    return serving.Row(setup=setup, method=method, concurrency=level, **more)


def test_rows_survive_a_crash_and_another_setup(tmp_path: Path) -> None:
    path = tmp_path / "out" / "serving.jsonl"
    serving.append(path, row(level=1, tokens=7))
    serving.append(path, row(level=2))
    serving.append(path, row(setup="other", level=4))
    with path.open("a") as file:
        file.write('{"setup": "a", "method": "plain", "concu')
    rows = serving.read_rows(path, "a")
    assert set(rows) == {("plain", 1), ("plain", 2)}
    assert rows["plain", 1].tokens == 7


def test_same_share_compares_with_plain_at_concurrency_one() -> None:
    plain = row(outputs={"x": "1", "y": "2"})
    tree = row(method="tree", outputs={"x": "1", "y": "3"})
    rows = {("plain", 1): plain, ("tree", 1): tree}
    assert serving.same_share(tree, rows) == "50 %"
    assert serving.same_share(tree, {("tree", 1): tree}) == "-"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "eagle"], "is not a list of: plain, chain, ngram, tree"),
        (["--concurrency", "0"], "must be above 0"),
        (["--concurrency", "a"], "not a list of numbers"),
        (["--minutes", "-1"], "must be above 0"),
        (["--model-path", "/nowhere"], "no model at /nowhere"),
    ],
)
def test_wrong_options_are_one_line(words: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "serving.py"), *words],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
