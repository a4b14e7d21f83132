"""Torch twin of the accept walk, vectorised over requests; the product path on CPU."""

from __future__ import annotations

import torch

from dflash_kernels.tree import DraftTree
from dflash_kernels.tree_accept import Accepted


def accept_tree_torch(
    tree: DraftTree,
    target_tokens: torch.Tensor,
    prefix_lens: torch.Tensor,
    *,
    max_depth: int,
    out: Accepted | None = None,
) -> Accepted:
    """Same contract as `dflash_kernels.accept_tree`."""
    bs, N = tree.tokens.shape
    dev = tree.tokens.device
    if N == 1 and max_depth == 0:  # a plain step's tree
        alone = Accepted(
            accept_lens=torch.ones(bs, dtype=torch.int32, device=dev),
            path=torch.zeros((bs, 1), dtype=torch.int32, device=dev),
            out_tokens=target_tokens,
            bonus=target_tokens[:, 0],
            new_lens=prefix_lens + 1,
        )
        return alone if out is None else out.copy_(alone)
    node = torch.arange(N, device=dev).expand(bs, N)

    # A node can be entered when something links to it and it carries its parent's target token.
    links = torch.cat([tree.first_child, tree.next_sibling], 1).long()
    linked = torch.zeros(bs, N + 1, dtype=torch.bool, device=dev)
    linked.scatter_(1, torch.where(links < 0, N, links), True)
    parents = tree.parents.long().clamp(min=0)
    enter = linked[:, :N] & (tree.tokens == target_tokens.gather(1, parents))
    step = torch.full((bs, N + 1), N, dtype=torch.int64, device=dev)
    step.scatter_reduce_(1, torch.where(enter, parents, N), node, "amin")
    step[:, N] = N  # N is the absorbing "stopped" state

    walk = [torch.zeros(bs, 1, dtype=torch.int64, device=dev)]
    for _ in range(max_depth):
        walk.append(step.gather(1, walk[-1]))
    path = torch.cat(walk, 1)
    live = path < N
    accept_lens = live.sum(1)
    out_tokens = target_tokens.gather(1, torch.where(live, path, 0)) * live
    accepted = Accepted(
        accept_lens=accept_lens.int(),
        path=torch.where(live, path, -1).int(),
        out_tokens=out_tokens,
        bonus=out_tokens.gather(1, accept_lens[:, None] - 1)[:, 0],
        new_lens=prefix_lens + accept_lens.to(prefix_lens.dtype),
    )
    return accepted if out is None else out.copy_(accepted)
