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


@pytest.mark.skipif(interpreting(), reason="this is the interpreter's process")
def test_triton_kernels_in_the_interpreter():
    env = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", str(here)],
        env=env,
        cwd=here.parent.parent,
        capture_output=True,
        text=True,
        timeout=570,
    )
    assert run.returncode == 0, f"{run.stdout[-6000:]}\n{run.stderr[-2000:]}"
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed, run.stdout
    # Guards against a run that collects nothing or selects the wrong implementation.
    assert int(passed[1]) >= 60
    assert "backends ['triton']" in run.stdout
