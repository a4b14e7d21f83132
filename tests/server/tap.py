"""Writes down what the served drafter proposed, changing nothing.

Loaded in the scheduler by ``SGLANG_DFLASH_CANDIDATES=tests.server.tap:candidates``; one file per
step and request goes to the folder ``DFLASH_TEST_TAP``.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import torch

from sglang_dflash.step.width import Step
from sglang_dflash.worker.draft import Candidates

_numbers = itertools.count()


def candidates(drafted: Candidates, step: Step, batch: Any) -> Candidates:
    folder = Path(os.environ["DFLASH_TEST_TAP"])
    for row, req in enumerate(batch.reqs):
        record = {
            "prompt": list(req.origin_input_ids),
            "prefix": int(step.prefix_lens[row]),
            "anchor": int(step.anchor[row]),
            "logprobs": drafted.logprobs[row].clone(),
            "ids": drafted.ids[row].clone(),
        }
        torch.save(record, folder / f"{next(_numbers):06d}.pt")
    return drafted
