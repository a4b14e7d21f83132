"""How deep the drafter expects the target to follow its tree, in trees of fewer nodes too.

What the width's policy learns from (``worker/width``): a node's probability is the product of its path's,
so the chance that the accepted path reaches depth d is the sum over the nodes of that depth.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from dflash_kernels import DraftTree, ancestor_mask

from sglang_dflash.worker.draft import Candidates

_NEVER = -1e4  # a log-probability whose sums stay finite


def reach(
    tree: DraftTree, candidates: Candidates, tiers: Sequence[int], sampled: torch.Tensor | None
) -> torch.Tensor:
    """float32 [2 (greedy, sampled), T, L]: summed over the requests of each class, the drafter's probability
    that the accepted path reaches depth d + 1 in the best tree of ``tiers[t]`` nodes.

    Args:
        tree: of [bs, N].
        candidates: what it was built from, [bs, L, K].
        tiers: T numbers of nodes, ascending, none above N.
        sampled: bool [bs], None where every request is greedy.
    """
    bs, nodes = tree.tokens.shape
    depths, top = candidates.ids.shape[1:]
    at = (tree.depth.long() - 1).clamp(min=0)[:, :, None].expand(-1, -1, top)
    mine = candidates.ids.gather(1, at) == tree.tokens[:, :, None]
    logprobs = candidates.logprobs.gather(1, at).clamp(min=_NEVER).masked_fill(~mine, 0.0).sum(2)
    logprobs[:, 0] = 0.0
    paths = ancestor_mask(tree.ancestors, nodes).float() @ logprobs[:, :, None]
    # The root is the target's own; a node that nothing links to is padding, whatever its token.
    links = torch.cat([tree.first_child, tree.next_sibling], 1).long()
    linked = torch.zeros((bs, nodes + 1), device=links.device).scatter_(1, links.remainder(nodes + 1), 1.0)
    chance = paths[:, :, 0].exp() * mine.any(2) * linked[:, :nodes]
    chance, order = chance.sort(dim=1, descending=True, stable=True)
    depth = tree.depth.gather(1, order)
    level = torch.arange(1, depths + 1, device=depth.device)
    total = (chance[:, :, None] * (depth[:, :, None] == level)).cumsum(1)
    # A tree of t nodes has t - 1 below its root. Slices: an index made here would be copied to the device.
    nothing = torch.zeros_like(total[:, 0])
    by_tier = torch.stack([total[:, t - 2] if t > 1 else nothing for t in tiers], 1)
    share = torch.zeros(bs, device=depth.device) if sampled is None else sampled.float()
    classes = torch.stack([1.0 - share, share])
    return (classes @ by_tier.reshape(bs, -1)).view(2, len(tiers), depths)
