"""Candidates from known answers: forces accepted paths through chosen ranks of the tree.

Loaded in the scheduler by ``SGLANG_DFLASH_CANDIDATES=tests.server.oracle:candidates``. A request
brings its answer along, plain decoding's output, as ``custom_params={"answer": [...]}`` of its
sampling parameters, or, where no answer is known before, ``{"options": [[...], ...]}``: for each token
of the answer the ids to try, best first. One without either keeps the drafter's candidates.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_dflash.step.width import Step
from sglang_dflash.worker.draft import Candidates

#: Hardly ever right.
WRONG = [7, 11, 13]


def candidates(drafted: Candidates, step: Step, batch: Any) -> Candidates:
    """The right token at depth d has rank 1 where (position + d) % 3 is 0, else rank 0.

    Every third depth the accepted path therefore leaves the spine; from there on it can only go on
    through non-spine nodes, whose KV rows have to move. Two of the other candidates are wrong on
    purpose. Depths past four are wrong, so every step ends inside the tree. Options are taken as they are.
    """
    logprobs, ids = drafted.logprobs.clone(), drafted.ids.clone()
    for row, req in enumerate(batch.reqs):
        told = req.sampling_params.custom_params or {}
        answer, options = told.get("answer"), told.get("options")
        if answer is None and options is None:
            continue
        logprobs[row] = -1e4
        # Tokens already committed, the anchor included; the host's own list lags under overlap.
        done = int(step.prefix_lens[row]) + 1 - len(req.origin_input_ids)
        for depth in range(ids.shape[1]):
            position = done + depth
            if options is not None:
                order = options[position] if position < len(options) else WRONG
            else:
                right = answer[position] if position < len(answer) and depth < 4 else None
                wrong = [token for token in WRONG if token != right]
                rank = 1 if position % 3 == 0 else 0
                order = wrong[:2] if right is None else [*wrong[:rank], right, *wrong[rank:2]]
            ids[row, depth, : len(order)] = torch.tensor(order)
            logprobs[row, depth, : len(order)] = -0.3 * torch.arange(1, len(order) + 1)
    return Candidates(logprobs, ids)
