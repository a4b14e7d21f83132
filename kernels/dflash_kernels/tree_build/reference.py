"""Torch twin of the tree builder, vectorised over requests; the product path on CPU.

A depth's children are laid out by (parent's place, rank), as few as `places.py` finds possible, and the
nodes of all depths by (depth, place). Taking the best, and of equal ones the first, then applies the whole
tie rule at once, because a parent never comes behind its child.

Edges and chains are searched in `lattice_reference.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from dflash_kernels.tree import WORD_BITS, DraftTree, num_words
from dflash_kernels.tree_build import Chain
from dflash_kernels.tree_build.places import best_first, lay_places


@dataclass
class Nodes:
    """Every node that can be in the tree, depth after depth, best first within a depth: F of them.

    Attributes:
        score: float32 [bs, F]; the sort that picks the nodes goes by it.
        up: int64 [bs, F], the parent's index in here; below 0 for the root.
        token: int64 [bs, F], index of its token among those given to the layout.
        above: int64 [F], depth - 1.
        spine: bool [F], whether it is the spine's node if it is in the tree; None where that has to be found
            by walking.
        depths: no node is deeper.
    """

    score: torch.Tensor
    up: torch.Tensor
    token: torch.Tensor
    above: torch.Tensor
    spine: torch.Tensor | None
    depths: int


@lru_cache(maxsize=64)
def own_bits(num_nodes: int, device: torch.device) -> torch.Tensor:
    """int32 [N, ceil(N / 32)], node j's own bit."""
    bits = torch.zeros(num_nodes, num_words(num_nodes), dtype=torch.int32)
    for j in range(num_nodes):
        bit = 1 << (j % WORD_BITS)
        bits[j, j // WORD_BITS] = bit - (1 << WORD_BITS) if bit >> (WORD_BITS - 1) else bit
    return bits.to(device)


def gain_of(logprobs: torch.Tensor, depth_bonus: torch.Tensor | None = None) -> torch.Tensor:
    """min(0, logprob + bonus), NaN as -inf; `depth_bonus` broadcasts."""
    gain = logprobs if depth_bonus is None else logprobs + depth_bonus
    return gain.nan_to_num(nan=float("-inf"), posinf=0.0, neginf=float("-inf")).clamp_(max=0.0)


def build_tree_torch(
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
    """Same contract as `dflash_kernels.build_tree`."""
    N, L = num_nodes, topk_logprobs.shape[1]
    W = max(N - 1, 1)  # no depth has more places, and none lies deeper
    force = keep_spine and N >= L + 1
    logprobs, ids = topk_logprobs.float()[:, :W], topk_ids.long()[:, :W]
    bonus = None if depth_bonus is None else depth_bonus.float()[:W, None]
    if edges is None and chain is None:
        tokens, nodes = ids.flatten(1), _search(logprobs, bonus, W)
    else:
        from dflash_kernels.tree_build.lattice_reference import search_lattice

        edges = None if edges is None else edges.float()[:, :W]
        tokens, nodes = search_lattice(logprobs, ids, bonus, edges, chain, W, force_spine=force)
    tree = _lay_out(anchor, tokens, nodes, N, force_spine=force)
    return tree if out is None else out.copy_(tree)


def _search(logprobs: torch.Tensor, bonus: torch.Tensor | None, W: int) -> Nodes:
    """The best nodes of each depth where all parents rank the same children."""
    bs, L, K = logprobs.shape
    layout = lay_places(W, L, K, logprobs.device)
    gain = gain_of(logprobs, bonus).cummin(dim=2).values.flatten(1).index_select(1, layout.entry)
    score = gain.new_zeros(bs, 1)
    scores, picks = [score[:, :0]], [layout.rank.new_empty(bs, 0)]
    counts = [level.count for level in layout.levels]
    for level, gains in zip(layout.levels, gain.split(counts, 1), strict=True):
        score, pick = best_first(score.index_select(1, level.place) + gains, level.width)
        scores.append(score)
        picks.append(pick)
    child = torch.cat(picks, 1) + layout.first_child
    return Nodes(
        score=torch.cat(scores, 1),
        up=layout.place[child] + layout.first_above,
        token=layout.rank[child] + layout.above * K,
        above=layout.above,
        spine=layout.leads,
        depths=L,
    )


def _lay_out(
    anchor: torch.Tensor, tokens: torch.Tensor, nodes: Nodes, N: int, *, force_spine: bool
) -> DraftTree:
    """Takes the N - 1 best nodes, numbers them and writes the tree; `tokens` int64 [bs, any]."""
    bs, dev = anchor.shape[0], anchor.device
    if force_spine:
        score = nodes.score.masked_fill(nodes.spine, float("inf"))
        best, chosen = score.sort(dim=1, descending=True, stable=True)
        best, chosen = best[:, : N - 1], chosen[:, : N - 1]
    else:  # laid out by (depth, place): this applies the tie rule
        best, chosen = best_first(nodes.score, N - 1)
    alive = best > float("-inf")
    above = nodes.above[chosen]

    # Numbers follow the order of selection, 0 is the root; ids have the spine in front.
    number = torch.arange(1, chosen.shape[1] + 1, device=dev).expand_as(chosen)
    up = nodes.up.gather(1, chosen)
    parent = torch.zeros_like(nodes.up).scatter_(1, chosen, number).gather(1, up.clamp(min=0))
    parent = torch.where(up < 0, 0, parent)
    spine = alive & (_on_spine(parent, alive, nodes.depths) if nodes.spine is None else nodes.spine[chosen])
    ids = torch.where(spine, above + 1, spine.sum(1, keepdim=True) + (alive & ~spine).cumsum(1))
    ids = torch.where(alive, ids, N)
    parent = torch.nn.functional.pad(ids, (1, 0)).gather(1, parent)

    token = anchor.long()[:, None].repeat(1, N + 1)
    token.scatter_(1, ids, tokens.gather(1, nodes.token.gather(1, chosen)))
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
    for _ in range(max(nodes.depths, 1).bit_length()):  # pointer doubling: 1, 2, 4, ... steps up
        ancestors = ancestors | ancestors.gather(1, jump[:, :, None].expand(-1, -1, ancestors.shape[2]))
        jump = jump.gather(1, jump)
    parents[:, 0] = -1

    tree = DraftTree(
        tokens=token[:, :N].contiguous(),
        parents=parents.int(),
        depth=depth[:, :N].contiguous(),
        first_child=torch.where(first_child < N, first_child, -1).int(),
        next_sibling=next_sibling.int(),
        ancestors=ancestors,
    )
    return tree


def _on_spine(parent: torch.Tensor, alive: torch.Tensor, depths: int) -> torch.Tensor:
    """Which of the selected nodes are the best child of a node of the spine, the root included.

    Args:
        parent: int64 [bs, n], the number of each node's parent; nodes have numbers 1..n in the order of
            selection.
        alive: bool [bs, n].
    """
    bs, n = parent.shape
    number = torch.arange(1, n + 1, device=parent.device).expand(bs, -1)
    best = torch.full((bs, n + 2), n + 1, dtype=torch.int64, device=parent.device)
    best.scatter_reduce_(1, torch.where(alive, parent, n + 1), number, "amin")
    spine = torch.nn.functional.pad(best.gather(1, parent) == number, (1, 0), value=True)
    jump = torch.nn.functional.pad(parent, (1, 0))
    for _ in range(depths.bit_length()):  # all ancestors by pointer doubling
        spine = spine & spine.gather(1, jump)
        jump = jump.gather(1, jump)
    return spine[:, 1:]
