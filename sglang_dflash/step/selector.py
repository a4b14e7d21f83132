"""DFlash 2's selector: how well each candidate follows each candidate of the position before it.

Its tables were trained beside the drafter; SGLang walks its scores greedily or by sampling
(``models/dflash.py: CandidateSelector``). Here they become the edges of the lattice that a tree is built
from, so a tree holds that walk and the next best ones.
"""

from __future__ import annotations

from typing import Any

import torch


class Selector:
    """The scores of a drafter's selector.

    Args:
        module: SGLang's ``CandidateSelector``, its weights loaded.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self.top_k = int(module.top_k)

    def pairs(self, anchor: torch.Tensor, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [bs, L, K, K]: what a candidate (last) gains behind a candidate of the position before it.

        The first position follows the anchor alone: all its rows are alike.

        Args:
            anchor: int64 [bs].
            ids: int64 [bs, L, K], candidates.
            hidden: [bs, L, H], the drafter's states of the positions.
        """
        module = self._module
        first = anchor[:, None, None].expand(-1, 1, ids.shape[2])
        before = module.predecessor_codebook[torch.cat([first, ids[:, :-1]], 1)]
        projected = module.hidden_projection(hidden)
        after = module.successor_codebook[ids]
        # The products' dtype is SGLang's, so that near-ties fall as in its chain.
        return torch.einsum("blpr,blcr->blpc", before * projected[:, :, None], after).float()


def edges_of(logprobs: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """float32 [.., K, K]: log-probability of each candidate (last) given each predecessor.

    Args:
        logprobs: float32 [.., K], what the drafter says without a predecessor. How much of the vocabulary the
            candidates hold is taken from it: the selector ranks candidates, it knows of no others.
        pairs: float32 [.., K, K].
    """
    held = logprobs.logsumexp(-1, keepdim=True)[..., None]
    return (logprobs[..., None, :] + pairs).log_softmax(-1) + held
