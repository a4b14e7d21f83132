"""The draft tree as flat tensors, shared by every kernel of the package."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

WORD_BITS = 32


@dataclass
class DraftTree:
    """A batch of draft trees with a fixed node budget N; node 0 is the root.

    Invariants kept by `build_tree`: ids are topological (a parent's id is below its child's), an id is
    never below its node's depth (KV compaction relies on it), the children of one node have different tokens
    and ascending ids, best first, and what is selected of the spine (the walk from the root to each node's
    best child) has id = depth.

    Attributes:
        tokens: int64 [bs, N]; tokens[:, 0] is the anchor (the last committed token).
        parents: int32 [bs, N]; -1 for the root, 0 for padding nodes.
        depth: int32 [bs, N]; 0 for the root, 1 for padding nodes.
        first_child: int32 [bs, N]; -1 for none.
        next_sibling: int32 [bs, N]; -1 for none. A padding node is linked from no node.
        ancestors: int32 [bs, N, ceil(N / 32)]; bit j % 32 of word j // 32 is set when node j is an ancestor
            of this node or the node itself.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depth: torch.Tensor
    first_child: torch.Tensor
    next_sibling: torch.Tensor
    ancestors: torch.Tensor

    @classmethod
    def empty(cls, bs: int, num_nodes: int, device: torch.device | str = "cpu") -> DraftTree:
        """Uninitialised buffers, e.g. static ones for a CUDA graph."""

        def i32(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        return cls(
            tokens=torch.empty((bs, num_nodes), dtype=torch.int64, device=device),
            parents=i32(bs, num_nodes),
            depth=i32(bs, num_nodes),
            first_child=i32(bs, num_nodes),
            next_sibling=i32(bs, num_nodes),
            ancestors=i32(bs, num_nodes, num_words(num_nodes)),
        )

    @classmethod
    def roots(cls, anchor: torch.Tensor) -> DraftTree:
        """Trees without a draft: each request's last token, int64 [bs], and nothing below it."""
        bs, device = anchor.shape[0], anchor.device
        none = torch.full((bs, 1), -1, dtype=torch.int32, device=device)
        return cls(
            tokens=anchor.long()[:, None],
            parents=none,
            depth=torch.zeros((bs, 1), dtype=torch.int32, device=device),
            first_child=none,
            next_sibling=none,
            ancestors=torch.ones((bs, 1, 1), dtype=torch.int32, device=device),
        )

    @property
    def num_nodes(self) -> int:
        return self.tokens.shape[1]

    def copy_(self, other: DraftTree) -> DraftTree:
        """Copies `other` into these buffers, which keep their addresses."""
        for f in fields(self):
            getattr(self, f.name).copy_(getattr(other, f.name))
        return self


def num_words(num_nodes: int) -> int:
    """Number of 32-bit words that hold one bit per node."""
    return (num_nodes + WORD_BITS - 1) // WORD_BITS


def ancestor_mask(ancestors: torch.Tensor, num_nodes: int) -> torch.Tensor:
    """Unpacks ancestor words.

    Args:
        ancestors: int32 [bs, N, ceil(N / 32)].
        num_nodes: N.

    Returns:
        bool [bs, N, N]; [b, i, j] says that node j is visible to node i.
    """
    j = torch.arange(num_nodes, device=ancestors.device, dtype=torch.int32)
    words = ancestors[..., (j // WORD_BITS).long()]
    return ((words >> (j % WORD_BITS)) & 1).bool()
