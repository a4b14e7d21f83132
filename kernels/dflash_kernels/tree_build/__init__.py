"""Best-first draft tree from per-position candidates (DDTree, arXiv 2604.12989)."""

from __future__ import annotations

import torch

from dflash_kernels._dispatch import use_triton
from dflash_kernels.tree import DraftTree

MAX_NODES = 128


def build_tree(
    anchor: torch.Tensor,
    topk_logprobs: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    num_nodes: int,
    depth_bonus: torch.Tensor | None = None,
    keep_spine: bool = False,
    out: DraftTree | None = None,
) -> DraftTree:
    """Selects the most probable prefixes of a factorised draft block.

    A block drafter gives one distribution per position, so every node of depth d has the same ranked
    children. score(child) = score(parent) + min(0, logprob + depth_bonus[d]); the `num_nodes - 1` best
    prefixes are kept, which is a tree because scores never rise along a path.

    Order and ties: score descending, then depth ascending, then the parent's place in this same order among
    the nodes of its depth, then the rank ascending. Scores are float32 sums taken from the root down, so
    every implementation gives the same tree bit for bit. Ids: what is in of the top-1 chain (spine) first
    (id = depth), then the rest in the order above; with a kept spine, the first n nodes are budget n's tree.

    NaN counts as -inf; a candidate of rank k counts as at most as likely as rank k - 1 (so everything
    behind a NaN is dropped); candidates of probability zero are never selected, save as part of a kept
    spine. Where fewer than `num_nodes - 1` remain, the tree is filled with unlinked padding nodes.

    Args:
        anchor: int64 [bs], the root's token.
        topk_logprobs: float32 [bs, L, K], log-probabilities of the draft positions, descending in K.
        topk_ids: int64 [bs, L, K], distinct valid token ids within a position.
        num_nodes: N, 1..128, the root included.
        depth_bonus: float32 [L] added to the log-probabilities of each position, or None.
        keep_spine: force the whole top-1 chain in when N >= L + 1, whatever its score.
        out: buffers to fill (static addresses); new ones if None.

    Returns:
        DraftTree of [bs, N].

    Raises:
        ValueError: shapes do not fit, or N is outside 1..128.
    """
    if topk_logprobs.ndim != 3 or topk_logprobs.shape != topk_ids.shape:
        raise ValueError(
            f"topk_logprobs {tuple(topk_logprobs.shape)} and topk_ids {tuple(topk_ids.shape)} must both be "
            "[bs, L, K]"
        )
    if anchor.shape != topk_logprobs.shape[:1]:
        raise ValueError(f"anchor must be [{topk_logprobs.shape[0]}], not {tuple(anchor.shape)}")
    if not 1 <= num_nodes <= MAX_NODES:
        raise ValueError(f"num_nodes must be 1..{MAX_NODES}, not {num_nodes}")
    if depth_bonus is not None and depth_bonus.shape != topk_logprobs.shape[1:2]:
        raise ValueError(f"depth_bonus must be [{topk_logprobs.shape[1]}], not {tuple(depth_bonus.shape)}")
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
        out=out,
    )
