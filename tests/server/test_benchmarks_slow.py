"""The serving benchmarks from end to end, over a tiny pair: servers, rounds, rows, resumption, pictures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sglang_dflash.client import fast_start
from tests.server.support import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.server]


def bench(script: str, pair: tuple[Path, Path], out: Path, *words: str) -> tuple[str, list[dict[str, Any]]]:
    """Runs one benchmark; what it printed and its rows."""
    target, drafter = pair
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), "--out", str(out), *words]
    command += ["--model-path", str(target), "--drafter", str(drafter), "--", "--max-total-tokens", "4096"]
    quick = fast_start.disabled_models(fast_start.EMBEDDED)
    env = {**os.environ, fast_start.VARIABLE: quick, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command], capture_output=True, text=True, timeout=1000, env=env)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout, [json.loads(line) for line in (out / f"{script}.jsonl").read_text().splitlines()]


def test_serving(tiny_pair: tuple[Path, Path], tmp_path: Path) -> None:
    few = ["--concurrency", "1,4", "--max-tokens", "8"]
    methods = ["plain", "chain", "2x2", "auto"]
    words = [*few, "--rounds", "1", "--methods", ",".join(methods)]
    _, rows = bench("serving", tiny_pair, tmp_path, *words)
    assert len(rows) == 8
    assert {(row["method"], row["concurrency"]) for row in rows} == {(m, c) for m in methods for c in (1, 4)}
    for row in rows:
        # float32: every output is plain decoding's.
        mate = next(r for r in rows if r["method"] == "plain" and r["concurrency"] == row["concurrency"])
        assert row["outputs"] == mate["outputs"]
        assert ("widths" in row) == (row["method"] == "auto")
        assert row["tokens"] > 0
    # What a round lacks is measured, what is there is not.
    (tmp_path / "serving.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    _, again = bench("serving", tiny_pair, tmp_path, *words)
    assert again[:7] == rows[:-1]
    broken = rows[-1]["concurrency"]
    assert [row["concurrency"] for row in again[7:]] == [broken] * 4
    text, last = bench("serving", tiny_pair, tmp_path, *words)
    assert last == again
    assert "auto / best" in text
    assert (tmp_path / "serving.png").stat().st_size > 10_000


def test_never_pays(tiny_pair: tuple[Path, Path], tmp_path: Path) -> None:
    words = ["--concurrency", "4", "--rounds", "1", "--tokens", "24"]
    text, rows = bench("never_pays", tiny_pair, tmp_path, *words)
    assert {(r["kind"], r["method"]) for r in rows} == {
        (k, m) for k in ("wrong", "noise") for m in ("plain", "1x1", "auto")
    }
    assert {r["tokens"] for r in rows} == {4 * 24}
    for row in rows:
        if row["method"] == "1x1":
            assert row["parts"]["commit_seconds"] > 0
            assert row["parts"]["decode_steps"] >= 23  # the first token comes from the prefill
    assert "drafts that never pay" in text


def test_changing_load(tiny_pair: tuple[Path, Path], tmp_path: Path) -> None:
    words = ["--seconds", "3", "--rounds", "1", "--methods", "plain,2x2,auto"]
    text, rows = bench("changing_load", tiny_pair, tmp_path, *words)
    assert {row["method"] for row in rows} == {"plain", "2x2", "auto"}
    for row in rows:
        assert [len(phase) for phase in row["tokens"]] == [3] * 4
        assert all(sum(phase) > 0 for phase in row["tokens"])
    assert "auto / oracle" in text
    assert (tmp_path / "changing_load.png").stat().st_size > 10_000
