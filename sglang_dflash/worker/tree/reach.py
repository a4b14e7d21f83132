"""How deep the drafter expects the target to follow its tree, in trees of fewer nodes too.

What the width's policy learns from (``worker/width``): a node's probability is the product of its path's,
so the chance that the accepted path reaches depth d is the sum over the nodes of that depth.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from dflash_kernels import Chain, DraftTree, ancestor_mask

from sglang_dflash.step.report import by_class
from sglang_dflash.step.trace import Chances
from sglang_dflash.worker.draft import Candidates

_NEVER = -1e4  # a log-probability whose sums stay finite


def reach(
    tree: DraftTree,
    candidates: Candidates,
    tiers: Sequence[int],
    sampled: torch.Tensor | None,
    chain: Chain | None = None,
) -> torch.Tensor:
    """float32 [2 (greedy, sampled), T, L]: summed over the requests of each class, the drafter's probability
    that the accepted path reaches depth d + 1 in the best tree of ``tiers[t]`` nodes.

    Args:
        tree: of [bs, N].
        candidates: what it was built from, [bs, L, K].
        tiers: T numbers of nodes, ascending, none above N.
        sampled: bool [bs], None where every request is greedy.
        chain: the path that was recalled into the tree, of [bs, D]; its nodes count by its own probabilities.
            Those beyond the block are left out: what they bring is no drafter's (``worker/width/beyond.py``).
    """
    bs = tree.tokens.shape[0]
    depths = candidates.ids.shape[1]
    chance, order = chances(tree, candidates, chain).path.sort(dim=1, descending=True, stable=True)
    # The root, which comes first, is the target's own.
    chance, depth = chance[:, 1:], tree.depth.gather(1, order)[:, 1:]
    level = torch.arange(1, depths + 1, device=depth.device)
    total = (chance[:, :, None] * (depth[:, :, None] == level)).cumsum(1)
    # A tree of t nodes has t - 1 below its root. Slices: an index made here would be copied to the device.
    nothing = torch.zeros_like(level, dtype=torch.float32).expand(bs, -1)
    by_tier = torch.stack([total[:, t - 2] if t > 1 else nothing for t in tiers], 1)
    return by_class(by_tier.reshape(bs, -1), sampled).view(2, len(tiers), depths)


def chances(tree: DraftTree, candidates: Candidates, chain: Chain | None = None) -> Chances:
    """The drafter's probability of every node's path, of trees [bs, N]; see `reach` for the arguments."""
    bs, nodes = tree.tokens.shape
    depths, top = candidates.ids.shape[1:]
    place = (tree.depth.long() - 1).clamp(min=0)
    at = place.clamp(max=depths - 1)[:, :, None].expand(-1, -1, top)
    mine = (candidates.ids.gather(1, at) == tree.tokens[:, :, None]) & (place < depths)[:, :, None]
    known = mine.any(2)
    logprobs = candidates.logprobs.gather(1, at).clamp(min=_NEVER).masked_fill(~mine, 0.0).sum(2)
    if candidates.edges is not None:
        logprobs = torch.where(_given(tree, known), _by_edges(tree, candidates, mine, at), logprobs)
    lineage = ancestor_mask(tree.ancestors, nodes).float()
    on = torch.zeros_like(known)
    if chain is not None:
        on, said = _recalled(tree, chain, place, lineage)
        logprobs, known = torch.where(on, said, logprobs), known | on
    logprobs[:, 0] = 0.0
    paths = lineage @ logprobs[:, :, None]
    # The root is the target's own; a node that nothing links to is padding, whatever its token.
    links = torch.cat([tree.first_child, tree.next_sibling], 1).long()
    linked = torch.zeros((bs, nodes + 1), device=links.device).scatter_(1, links.remainder(nodes + 1), 1.0)
    linked[:, 0] = 1.0
    linked = linked[:, :nodes]
    chance = paths[:, :, 0].exp() * known * linked
    chance[:, 0] = 1.0
    return Chances(chance, on, linked.sum(1))


def _recalled(
    tree: DraftTree, chain: Chain, place: torch.Tensor, lineage: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which nodes are the chain's, bool [bs, N], and the chain's log-probabilities at all nodes' depths.

    Args:
        place: int64 [bs, N], depth - 1.
        lineage: float [bs, N, N], 1 for a node's ancestors and itself.
    """
    length = chain.ids.shape[1]
    there = place.clamp(max=length - 1)
    said = chain.logprobs.gather(1, there)
    same = (chain.ids.gather(1, there) == tree.tokens) & (place < length) & said.isfinite()
    same[:, 0] = True
    strangers = lineage @ (~same).float()[:, :, None]  # on the way from the root
    return strangers[:, :, 0] == 0, said.clamp(min=_NEVER)


def _given(tree: DraftTree, known: torch.Tensor) -> torch.Tensor:
    """bool [bs, N]: the node's parent is a candidate, or the root, so an edge leads to it."""
    parents = tree.parents.long().clamp(min=0)
    return known.gather(1, parents) | (tree.depth <= 1)


def _by_edges(tree: DraftTree, candidates: Candidates, mine: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """float32 [bs, N]: each node's log-probability given its parent.

    Args:
        mine: bool [bs, N, K], which candidate a node is.
        at: int64 [bs, N, K], its position.
    """
    assert candidates.edges is not None
    bs, _, top = candidates.ids.shape
    rank = mine.int().argmax(2)
    above = rank.gather(1, tree.parents.long().clamp(min=0)).masked_fill(tree.depth <= 1, 0)
    place = (at[:, :, 0] * top + above) * top + rank
    return candidates.edges.reshape(bs, -1).gather(1, place).clamp(min=_NEVER)
