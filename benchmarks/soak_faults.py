"""Drafts that fail now and then, for the soak: every ``EVERY``-th step one request's draft is NaN.

Loaded in the scheduler by ``SGLANG_DFLASH_CANDIDATES=benchmarks.soak_faults:candidates``.
"""

from __future__ import annotations

import itertools
from typing import Any

from sglang_dflash.step.width import Step
from sglang_dflash.worker.draft import Candidates

EVERY = 97
_steps = itertools.count(1)


def candidates(drafted: Candidates, step: Step, batch: Any) -> Candidates:
    number = next(_steps)
    if number % EVERY == 0:
        drafted.logprobs[number % drafted.logprobs.shape[0]] = float("nan")
    return drafted
