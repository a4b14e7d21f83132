"""The kernel benchmark runs, and says so where it cannot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dflash_kernels._dispatch import interpreting

if interpreting():
    pytest.skip("times the compiled or torch implementations", allow_module_level=True)

ROOT = Path(__file__).parents[2]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/kernels.py", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_cpu_rows(tmp_path):
    out = tmp_path / "rows.jsonl"
    shape = ("--bs", "1", "--ctx", "64", "--nodes", "16")
    done = run("--device", "cpu", *shape, "--only", "attention", "--out", str(out))
    assert done.returncode == 0, done.stderr
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert set(row["seconds"]) == {"ours", "sdpa"}, row["missing"]
    assert all(0 < s < 60 for s in row["seconds"].values())
    assert row["floor"] > 0
    assert row["triton"] != "absent"


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_without_cuda_it_says_so():
    done = run()
    assert done.returncode == 1
    assert done.stdout.count("\n") == 1
    assert "--device cpu" in done.stdout


def test_documented_predictions_are_the_models():
    done = subprocess.run(
        [sys.executable, "benchmarks/kernel_model.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout in (ROOT / "docs" / "kernels.md").read_text()
