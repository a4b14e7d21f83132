"""Random draft trees for the tests, drawn by hypothesis or by a seed."""

from __future__ import annotations

import random
from dataclasses import fields

import torch
from dflash_kernels import DraftTree, num_words
from hypothesis import strategies as st


def pack_ancestors(rows: list[list[set[int]]], num_nodes: int) -> torch.Tensor:
    """int32 [bs, N, W] words of explicit ancestor sets."""
    words = torch.zeros(len(rows), num_nodes, num_words(num_nodes), dtype=torch.int64)
    for b, sets in enumerate(rows):
        for i, members in enumerate(sets):
            for j in members:
                words[b, i, j // 32] |= 1 << (j % 32)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def tree_from_parents(parents: list[list[int]], tokens: torch.Tensor, linked: list[int]) -> DraftTree:
    """A DraftTree from parent lists; request b has `linked[b]` real nodes, the rest is padding."""
    bs, N = tokens.shape
    depth = torch.ones(bs, N, dtype=torch.int32)
    first = torch.full((bs, N), -1, dtype=torch.int32)
    sibling = torch.full((bs, N), -1, dtype=torch.int32)
    ancestors: list[list[set[int]]] = []
    for b in range(bs):
        last: dict[int, int] = {}
        sets: list[set[int]] = []
        for i in range(N):
            up = parents[b][i]
            sets.append({i} | (sets[up] if i else set()))
            depth[b, i] = depth[b, up] + 1 if i else 0
            if 0 < i < linked[b]:
                if up in last:
                    sibling[b, last[up]] = i
                else:
                    first[b, up] = i
                last[up] = i
        ancestors.append(sets)
    return DraftTree(
        tokens=tokens.clone(),
        parents=torch.tensor(parents, dtype=torch.int32),
        depth=depth,
        first_child=first,
        next_sibling=sibling,
        ancestors=pack_ancestors(ancestors, N),
    )


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = 40, vocab: int = 4) -> DraftTree:
    """A batch of 1 to 3 arbitrary trees (not only those the builder makes), some with padding."""
    bs = draw(st.integers(1, 3))
    N = draw(st.integers(1, max_nodes))
    rng = random.Random(draw(st.integers(0, 2**32)))
    linked = [rng.randint(1, N) for _ in range(bs)]
    bushy = rng.random()
    parents = [
        [-1]
        + [(rng.randrange(i) if rng.random() < bushy else i - 1) if i < linked[b] else 0 for i in range(1, N)]
        for b in range(bs)
    ]
    tokens = torch.tensor([[rng.randrange(vocab) for _ in range(N)] for _ in range(bs)])
    return tree_from_parents(parents, tokens, linked)


def to_device(tree: DraftTree, device: str) -> DraftTree:
    return DraftTree(**{f.name: getattr(tree, f.name).to(device) for f in fields(tree)})
