"""Drafts that the target never accepts, as sure of themselves as the drafter was of its own.

Loaded in the scheduler by ``SGLANG_DFLASH_CANDIDATES=benchmarks.useless_drafts:candidates``. Batches in
which a request draws its tokens keep the drafter's own: benchmarks/never_pays.py makes those useless by their
temperature.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from sglang_dflash.step.width import Step
from sglang_dflash.worker.draft import Candidates


def candidates(drafted: Candidates, step: Step, batch: Any) -> Candidates:
    if step.noise is not None:
        return drafted
    # Every token's neighbour in the vocabulary; at its end there is one too.
    other = torch.where(drafted.ids > 0, drafted.ids - 1, drafted.ids + 1)
    return replace(drafted, ids=other)
