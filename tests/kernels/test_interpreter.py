"""Runs this directory's tests on the Triton kernels in the interpreter.

A process of its own: triton reads TRITON_INTERPRET when it is first imported.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from dflash_kernels._dispatch import interpreting

pytestmark = pytest.mark.skipif(interpreting(), reason="this is the interpreter's process")


def interpret(selection: str, seconds: int) -> int:
    """Tests of this directory that passed in the interpreter; the others fail the caller."""
    env = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", "-m", selection, str(here)],
        env=env,
        cwd=here.parent.parent,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert run.returncode == 0, f"{run.stdout[-6000:]}\n{run.stderr[-2000:]}"
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed, run.stdout
    assert "backends ['triton']" in run.stdout
    return int(passed[1])


# The numbers guard against a run that collects nothing or selects the wrong implementation.


def test_triton_kernels_in_the_interpreter():
    assert interpret("not slow", 1100) >= 90


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_long_loops_in_the_interpreter():
    assert interpret("slow", 3500) >= 2
