"""A drafter that returns NaN costs its request speed for a step, never a token.

Everything is decided on the device. A broken draft becomes a root without children: the target
pass commits the root's own next token, as plain decoding would.
"""

from __future__ import annotations

import torch
from dflash_kernels import DraftTree

from sglang_dflash.worker.draft import Candidates


def usable(candidates: Candidates) -> torch.Tensor:
    """bool [bs]: no NaN and no +inf among the request's log-probabilities; -inf is a zero probability."""
    good = (candidates.logprobs < float("inf")).flatten(1).all(1)
    if candidates.edges is None:
        return good
    return good & (candidates.edges < float("inf")).flatten(1).all(1)


def silence(candidates: Candidates, good: torch.Tensor) -> Candidates:
    """The candidates with every broken request's log-probabilities at -inf, so that a tree can be built."""
    logprobs = torch.where(good[:, None, None], candidates.logprobs, float("-inf"))
    edges = candidates.edges
    if edges is not None:
        edges = torch.where(good[:, None, None, None], edges, float("-inf"))
    return Candidates(logprobs, candidates.ids, edges)


def cut(tree: DraftTree, good: torch.Tensor) -> None:
    """Unlink every node of a broken request's tree, in place: acceptance and grammars stop at the root."""
    tree.first_child.masked_fill_(~good[:, None], -1)
    tree.next_sibling.masked_fill_(~good[:, None], -1)
