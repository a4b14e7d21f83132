"""Torch twin of the tree builder, vectorised over requests; the product path on CPU.

Two facts make it small. With candidates sorted by rank and a level's nodes sorted by score, the child
(parent place p, rank k) is preceded by the (p+1)(k+1)-1 children that dominate it, so a level of W places
needs only the pairs with (p+1)(k+1) <= W: about W ln W instead of W K. And a stable sort over all levels,
laid out by (depth, place), applies the whole tie rule at once, because a parent never sorts behind its child.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from dflash_kernels.tree import WORD_BITS, DraftTree, num_words


@lru_cache(maxsize=64)
def dominant_pairs(
    width: int, ranks: int, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(parent place, rank), int64 [C] each, of every child that can be among the first `width`."""
    pairs = [(p, k) for p in range(width) for k in range(ranks) if (p + 1) * (k + 1) <= width]
    place, rank = torch.tensor(pairs, dtype=torch.int64, device=device).unbind(1)
    return place, rank


@lru_cache(maxsize=64)
def own_bits(num_nodes: int, device: torch.device) -> torch.Tensor:
    """int32 [N, ceil(N / 32)], node j's own bit."""
    bits = torch.zeros(num_nodes, num_words(num_nodes), dtype=torch.int32)
    for j in range(num_nodes):
        bit = 1 << (j % WORD_BITS)
        bits[j, j // WORD_BITS] = bit - (1 << WORD_BITS) if bit >> (WORD_BITS - 1) else bit
    return bits.to(device)


def build_tree_torch(
    anchor: torch.Tensor,
    topk_logprobs: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    num_nodes: int,
    depth_bonus: torch.Tensor | None = None,
    keep_spine: bool = False,
    out: DraftTree | None = None,
) -> DraftTree:
    """Same contract as `dflash_kernels.build_tree`."""
    bs, L, K = topk_logprobs.shape
    N, dev = num_nodes, topk_logprobs.device
    W = max(N - 1, 1)
    place, rank = dominant_pairs(W, K, dev)

    gain = topk_logprobs.float()
    if depth_bonus is not None:
        gain = gain + depth_bonus.float()[None, :, None]
    gain = gain.nan_to_num(nan=float("-inf"), posinf=0.0, neginf=float("-inf")).clamp_(max=0.0)
    gain = gain.cummin(dim=2).values[:, :, rank]

    score = gain.new_full((bs, W), float("-inf"))
    score[:, 0] = 0.0
    scores, picks = [], []
    for d in range(L):
        child = score.index_select(1, place) + gain[:, d]
        if child.shape[1] < W:  # too few candidates for W places
            child = torch.nn.functional.pad(child, (0, W - child.shape[1]), value=float("-inf"))
        ordered, pick = child.sort(dim=1, descending=True, stable=True)
        score = ordered[:, :W]
        scores.append(score)
        picks.append(pick[:, :W])
    level = torch.stack(scores, 1)
    pick = torch.stack(picks, 1).clamp_(max=place.numel() - 1)

    order = _best_first(level, N, force_spine=keep_spine and N >= L + 1)
    return _lay_out(anchor, topk_ids, place[pick], rank[pick], *order, N, out)


def _best_first(level: torch.Tensor, N: int, *, force_spine: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The N - 1 best nodes of all depths, best first.

    Args:
        level: float32 [bs, L, W], scores of each depth's places in order.

    Returns:
        int64 [bs, n <= N - 1] flat (depth - 1) * W + place, and bool [bs, n], False for probability zero.
    """
    bs, L, W = level.shape
    if force_spine:
        level = level.clone()
        level[:, :, 0] = float("inf")
    # Row-major order is (depth, place): a stable sort applies the tie rule.
    best, index = level.view(bs, L * W).sort(dim=1, descending=True, stable=True)
    return index[:, : N - 1], best[:, : N - 1] > float("-inf")


def _lay_out(
    anchor: torch.Tensor,
    topk_ids: torch.Tensor,
    place: torch.Tensor,
    rank: torch.Tensor,
    chosen: torch.Tensor,
    alive: torch.Tensor,
    N: int,
    out: DraftTree | None,
) -> DraftTree:
    """Numbers the chosen nodes and writes the tree.

    Args:
        place, rank: int64 [bs, L, W], the parent's place at the depth above and the rank of each node.
        chosen, alive: from `_best_first`.
    """
    bs, L, W = place.shape
    dev = place.device
    above, at = chosen // W, chosen % W  # depth - 1, place
    spine = alive & (at == 0)
    other = alive & (at != 0)
    ids = torch.where(spine, above + 1, spine.sum(1, keepdim=True) + other.cumsum(1))
    ids = torch.where(alive, ids, N)
    id_of = torch.zeros(bs, L * W, dtype=torch.int64, device=dev).scatter_(1, chosen, ids)
    up = (above - 1).clamp(min=0) * W + place.view(bs, L * W).gather(1, chosen)
    parent = torch.where(above > 0, id_of.gather(1, up), 0)

    tokens = anchor.long()[:, None].repeat(1, N + 1)
    candidate = above * topk_ids.shape[2] + rank.view(bs, L * W).gather(1, chosen)
    tokens.scatter_(1, ids, topk_ids.long().reshape(bs, -1).gather(1, candidate))
    parents = torch.zeros(bs, N + 1, dtype=torch.int64, device=dev).scatter_(1, ids, parent)[:, :N]
    depth = torch.ones(bs, N + 1, dtype=torch.int32, device=dev).scatter_(1, ids, above.int() + 1)
    depth[:, 0] = 0

    node = torch.arange(N, device=dev)
    linked = (node > 0) & (node <= alive.sum(1, keepdim=True))
    same = (parents[:, :, None] == parents[:, None, :]) & linked[:, None, :] & (node > node[:, None])
    sibling = torch.where(same, node, N).amin(2)
    next_sibling = torch.where((sibling < N) & linked, sibling, -1)
    first_child = torch.full((bs, N + 1), N, dtype=torch.int64, device=dev)
    first_child.scatter_reduce_(1, torch.where(linked, parents, N), node.expand(bs, N), "amin")
    first_child = first_child[:, :N]

    ancestors = own_bits(N, dev).expand(bs, -1, -1)
    jump = parents
    for _ in range(max(L, 1).bit_length()):  # pointer doubling: 1, 2, 4, ... steps up
        ancestors = ancestors | ancestors.gather(1, jump[:, :, None].expand(-1, -1, ancestors.shape[2]))
        jump = jump.gather(1, jump)
    parents[:, 0] = -1

    tree = DraftTree(
        tokens=tokens[:, :N].contiguous(),
        parents=parents.int(),
        depth=depth[:, :N].contiguous(),
        first_child=torch.where(first_child < N, first_child, -1).int(),
        next_sibling=next_sibling.int(),
        ancestors=ancestors,
    )
    return tree if out is None else out.copy_(tree)
