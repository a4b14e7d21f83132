"""Writes down what the served drafter proposed, changing nothing.

Loaded in the scheduler by ``SGLANG_DFLASH_CANDIDATES=tests.server.tap:candidates``; one file per
step and request goes to the folder ``DFLASH_TEST_TAP``. While a file ``keys`` lies beside that folder,
the drafter's K and V of the text so far are written down too.
"""

from __future__ import annotations

import inspect
import itertools
import os
from pathlib import Path
from typing import Any

import torch

from sglang_dflash.step.width import Step
from sglang_dflash.worker.draft import Candidates

_numbers = itertools.count()


def _drafter() -> Any:
    """Its ``ModelRunner``. Nothing hands it to a hook of the candidates, but the worker calls it."""
    frame = inspect.currentframe()
    while frame is not None:
        runner = getattr(frame.f_locals.get("self"), "draft_model_runner", None)
        if runner is not None:
            return runner
        frame = frame.f_back
    raise AssertionError("not called by a worker")


def keys_and_values(batch: Any, row: int, length: int) -> torch.Tensor:
    """[layers, 2, length, heads, dim], of the drafter."""
    table = batch.req_to_token_pool.req_to_token
    slots = table[batch.req_pool_indices[row], :length].long()
    pool = _drafter().token_to_kv_pool
    caches = zip(pool.k_buffer, pool.v_buffer, strict=True)
    return torch.stack([torch.stack([keys[slots], values[slots]]) for keys, values in caches])


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
        if (folder.parent / "keys").exists():
            record["keys"] = keys_and_values(batch, row, record["prefix"])
        torch.save(record, folder / f"{next(_numbers):06d}.pt")
    return drafted
