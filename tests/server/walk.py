"""Candidates that are a chain: what a drafter with a selector, or one without, says first.

Loaded in the scheduler by ``SGLANG_DFLASH_CANDIDATES=tests.server.walk:candidates``. A tree of as many nodes
as the block has rows is then the spine alone, which is what SGLang's own worker drafts. While the file that
``DFLASH_TEST_FREE`` names exists, the candidates stay what they are.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from sglang_dflash.step.width import Step
from sglang_dflash.worker.draft import Candidates


def candidates(drafted: Candidates, step: Step, batch: Any) -> Candidates:
    """Of every position the best candidate behind the one taken before it."""
    if Path(os.environ["DFLASH_TEST_FREE"]).exists():
        return drafted
    place = torch.zeros_like(drafted.ids[:, 0, :1])
    ids = []
    for depth in range(drafted.ids.shape[1]):
        if drafted.edges is not None:
            behind = drafted.edges[:, depth].gather(1, place[:, :, None].expand(-1, 1, drafted.ids.shape[2]))
            place = behind[:, 0].argmax(1, keepdim=True)
        ids.append(drafted.ids[:, depth].gather(1, place))
    # Each as good as certain, so that the whole chain is in the tree.
    chain = torch.stack(ids, 1)
    return Candidates(torch.full(chain.shape, -0.01), chain)
