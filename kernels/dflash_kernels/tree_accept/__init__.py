"""Walks draft trees along the target's own choices."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from dflash_kernels._dispatch import use_triton
from dflash_kernels.tree import DraftTree


@dataclass
class Accepted:
    """What one verification pass commits.

    Attributes:
        accept_lens: int32 [bs], tokens committed by this pass, the bonus token included: 1..L+1.
        path: int32 [bs, L+1], node ids from the root; -1 at and beyond accept_lens.
        out_tokens: int64 [bs, L+1], the committed tokens (target_tokens along the path); 0 beyond.
        bonus: int64 [bs], the last committed token, the next pass's anchor.
        new_lens: prefix_lens + accept_lens, dtype of prefix_lens.
    """

    accept_lens: torch.Tensor
    path: torch.Tensor
    out_tokens: torch.Tensor
    bonus: torch.Tensor
    new_lens: torch.Tensor

    @classmethod
    def empty(
        cls,
        bs: int,
        max_depth: int,
        device: torch.device | str = "cpu",
        lens_dtype: torch.dtype = torch.int64,
    ) -> Accepted:
        """Uninitialised buffers; use two in turn when the scheduler overlaps steps."""
        return cls(
            accept_lens=torch.empty(bs, dtype=torch.int32, device=device),
            path=torch.empty((bs, max_depth + 1), dtype=torch.int32, device=device),
            out_tokens=torch.empty((bs, max_depth + 1), dtype=torch.int64, device=device),
            bonus=torch.empty(bs, dtype=torch.int64, device=device),
            new_lens=torch.empty(bs, dtype=lens_dtype, device=device),
        )

    def copy_(self, other: Accepted) -> Accepted:
        for f in fields(self):
            getattr(self, f.name).copy_(getattr(other, f.name))
        return self


def accept_tree(
    tree: DraftTree,
    target_tokens: torch.Tensor,
    prefix_lens: torch.Tensor,
    *,
    max_depth: int,
    out: Accepted | None = None,
) -> Accepted:
    """Follows, from the root, the child that carries the token the target chose at the current node.

    With argmax tokens this is greedy verification; with one token sampled from the target's distribution
    at every node it is lossless sampling for any tree (SpecInfer's naive sampling, arXiv 2305.09781): the
    emitted tokens are exactly the target's samples.

    Args:
        tree: DraftTree of [bs, N]; only links (first_child, next_sibling), parents and tokens are read.
        target_tokens: int64 [bs, N], the target's token after each node.
        prefix_lens: int [bs], committed tokens before this pass (the root is not among them).
        max_depth: L; a walk stops there at the latest.
        out: buffers to fill; new ones if None.

    Returns:
        Accepted of [bs] and [bs, L+1].

    Raises:
        ValueError: target_tokens does not have the tree's shape.
    """
    if target_tokens.shape != tree.tokens.shape:
        raise ValueError(
            f"target_tokens {tuple(target_tokens.shape)} must match the tree's {tuple(tree.tokens.shape)}"
        )
    if use_triton(target_tokens):
        from dflash_kernels.tree_accept.kernel import accept_tree_triton as impl
    else:
        from dflash_kernels.tree_accept.reference import accept_tree_torch as impl
    return impl(tree, target_tokens, prefix_lens, max_depth=max_depth, out=out)
