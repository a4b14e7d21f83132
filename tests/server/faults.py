"""The oracle's candidates, from a drafter whose cache gets damaged in mid-request on demand.

Loaded in the scheduler by ``SGLANG_DFLASH_CANDIDATES=tests.server.faults:candidates``. A request
with ``custom_params={"damage": n}`` has one row of its drafter's KV cache set to NaN, once, when it
has n tokens, so that the drafter itself returns NaN from there on.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_dflash.step.width import Step
from sglang_dflash.upstream.bridge import Bridge
from sglang_dflash.worker.draft import Candidates
from tests.server import oracle

_run_drafter = Bridge.run_drafter
_damaged: set[str] = set()


def _damage(bridge: Bridge, batch: Any, row: int) -> None:
    """The row of the prompt's first token: the radix cache may share it with other requests."""
    slot = bridge.target.req_to_token_pool.req_to_token[batch.req_pool_indices[row], 0]
    pool = bridge.drafter.token_to_kv_pool
    pool.k_buffer[0][slot] = float("nan")
    pool.v_buffer[-1][slot] = float("inf")


def _run_damaged(self: Bridge, batch: Any, step: Step, *args: Any) -> torch.Tensor:
    for row, req in enumerate(batch.reqs):
        after = (req.sampling_params.custom_params or {}).get("damage")
        if after is not None and len(req.output_ids) >= after and req.rid not in _damaged:
            _damaged.add(req.rid)
            _damage(self, batch, row)
    return _run_drafter(self, batch, step, *args)


Bridge.run_drafter = _run_damaged


def candidates(drafted: Candidates, step: Step, batch: Any) -> Candidates:
    """The oracle's, save where the drafter returned NaN: that stays."""
    told = oracle.candidates(drafted, step, batch)
    return Candidates(torch.where(drafted.logprobs.isnan(), drafted.logprobs, told.logprobs), told.ids)
