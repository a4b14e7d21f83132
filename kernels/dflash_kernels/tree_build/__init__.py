"""Best-first draft tree over a lattice of candidates (DDTree, arXiv 2604.12989)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dflash_kernels._dispatch import use_triton
from dflash_kernels.tree import DraftTree

MAX_NODES = 128
#: Most candidates of a position and most depths: a key of the search holds each in 8 bits, and two ranks are
#: taken (a recalled token, no token).
MAX_RANKS = 254
MAX_DEPTH = 255


class Chain(NamedTuple):
    """One path from the root that is not the drafter's, such as a recalled continuation.

    Attributes:
        ids: int64 [bs, D], valid token ids where the chain goes on.
        logprobs: float32 [bs, D], of each token given all before it. The chain ends before the first that is
            -inf or NaN, so a request without a chain has -inf in front.
    """

    ids: torch.Tensor
    logprobs: torch.Tensor


def build_tree(
    anchor: torch.Tensor,
    topk_logprobs: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    num_nodes: int,
    depth_bonus: torch.Tensor | None = None,
    keep_spine: bool = False,
    edges: torch.Tensor | None = None,
    chain: Chain | None = None,
    out: DraftTree | None = None,
) -> DraftTree:
    """Selects the most probable prefixes of a draft block.

    A block drafter gives one distribution per position, so every node of depth d has the same ranked
    children. score(child) = score(parent) + min(0, logprob + depth_bonus[d]); the `num_nodes - 1` best
    prefixes are kept, which is a tree because scores never rise along a path.

    `edges` gives each candidate children of its own: their log-probabilities, and with them their ranks
    (log-probability descending, then candidate ascending), are those of the parent's row.

    `chain` adds one path from the root. Its token of depth d is a child of its node of depth d - 1 and of
    nothing else. Where that parent has the token among its candidates the two are one node with the chain's
    log-probability and, below it, the candidate's children. A token that is no candidate has no row in
    `edges`: its children are ranked by `topk_logprobs`. Beyond L the chain is alone. Its log-probabilities
    count as they are, without `depth_bonus`, which corrects the drafter's.

    Order and ties: score descending, then depth ascending, then the parent's place in this same order among
    the nodes of its depth (a kept spine's node before the others), then the chain's child before the
    parent's other children, then the rank in the parent's row ascending. Scores are float32 sums taken from
    the root down, so every implementation gives the same tree bit for bit. The spine is the walk from the
    root to each node's best child in this order. Ids: the selected part of the spine first (id = depth), then
    the rest in the order above; with a kept spine the first n nodes are the tree of budget n.

    NaN counts as -inf; without `edges` a candidate of rank k counts as at most as likely as rank k - 1 (so
    everything behind a NaN is dropped); candidates of probability zero are never selected, save as part of a
    kept spine. Where fewer than `num_nodes - 1` remain, the tree is filled with unlinked padding nodes.

    Args:
        anchor: int64 [bs], the root's token.
        topk_logprobs: float32 [bs, L, K], log-probabilities of the draft positions, descending in K unless
            `edges` are given. L may be 0.
        topk_ids: int64 [bs, L, K], distinct valid token ids within a position.
        num_nodes: N, 1..128, the root included.
        depth_bonus: float32 [L] added to the log-probabilities of each position, or None.
        keep_spine: force the first L nodes of the spine in when N >= L + 1, whatever their score.
        edges: float32 [bs, L, K, K], log-probability of candidate c (last) of a position given candidate p
            (third) of the position before it; the first position has only row 0, given the root. Or None.
        chain: `Chain` of [bs, D], or None. What of it lies beyond depth N - 1 is never read.
        out: buffers to fill (static addresses); new ones if None.

    Returns:
        DraftTree of [bs, N], no deeper than min(max(L, D), N - 1).

    Raises:
        ValueError: shapes do not fit, or N is outside 1..128.
    """
    if topk_logprobs.ndim != 3 or topk_logprobs.shape != topk_ids.shape:
        raise ValueError(
            f"topk_logprobs {tuple(topk_logprobs.shape)} and topk_ids {tuple(topk_ids.shape)} must both be "
            "[bs, L, K]"
        )
    bs, L, K = topk_logprobs.shape
    if anchor.shape != (bs,):
        raise ValueError(f"anchor must be [{bs}], not {tuple(anchor.shape)}")
    if not 1 <= num_nodes <= MAX_NODES:
        raise ValueError(f"num_nodes must be 1..{MAX_NODES}, not {num_nodes}")
    if K > MAX_RANKS or L > MAX_DEPTH:
        raise ValueError(f"at most {MAX_RANKS} candidates at {MAX_DEPTH} positions, not {K} at {L}")
    if depth_bonus is not None and depth_bonus.shape != (L,):
        raise ValueError(f"depth_bonus must be [{L}], not {tuple(depth_bonus.shape)}")
    if edges is not None and edges.shape != (bs, L, K, K):
        raise ValueError(f"edges must be [{bs}, {L}, {K}, {K}], not {tuple(edges.shape)}")
    if chain is not None:
        chain = Chain(*chain)
        shape = chain.ids.shape
        if len(shape) != 2 or shape[0] != bs or chain.logprobs.shape != shape:
            raise ValueError(
                f"chain's ids {tuple(shape)} and logprobs {tuple(chain.logprobs.shape)} must both be "
                f"[{bs}, D]"
            )
    if use_triton(topk_logprobs):
        from dflash_kernels.tree_build.kernel import build_tree_triton as impl
    else:
        from dflash_kernels.tree_build.reference import build_tree_torch as impl
    return impl(
        anchor,
        topk_logprobs,
        topk_ids,
        num_nodes=num_nodes,
        depth_bonus=depth_bonus,
        keep_spine=keep_spine,
        edges=edges,
        chain=chain,
        out=out,
    )
