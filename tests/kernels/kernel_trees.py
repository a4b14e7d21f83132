"""Random draft trees for the tests, drawn by hypothesis or by a seed."""

from __future__ import annotations

import random
from dataclasses import fields
from itertools import pairwise

import torch
from dflash_kernels import DraftTree, ancestor_mask, num_words
from hypothesis import strategies as st
from kernel_oracles import heap_tree


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


def candidates(bs: int, L: int, K: int, seed: int, step: float | None = None):
    """(anchor, logprobs, ids); `step` rounds the log-probabilities so that scores tie."""
    g = torch.Generator().manual_seed(seed)
    logprobs = (2 * torch.randn(bs, L, max(K, 2), generator=g)).log_softmax(-1)[..., :K]
    logprobs = logprobs.sort(dim=-1, descending=True).values
    if step:
        logprobs = (logprobs / step).round() * step
    ids = torch.rand(bs, L, 997, generator=g).topk(K).indices  # distinct within a position
    return torch.randint(0, 997, (bs,), generator=g), logprobs.contiguous(), ids


def assert_equal_to_heap(
    tree: DraftTree,
    anchor,
    topk_logprobs,
    topk_ids,
    num_nodes,
    depth_bonus=None,
    keep_spine=False,
    edges=None,
    chain=None,
) -> None:
    """Every field of the tree is the heap's, for every request."""
    tree = to_device(tree, "cpu")
    N = num_nodes
    mask = ancestor_mask(tree.ancestors, N)
    for b in range(anchor.shape[0]):
        oracle = heap_tree(
            int(anchor[b]),
            topk_logprobs[b].numpy(),
            topk_ids[b].numpy(),
            N,
            None if depth_bonus is None else depth_bonus.numpy(),
            keep_spine,
            None if edges is None else edges[b].numpy(),
            None if chain is None else [t[b].numpy() for t in chain],
        )
        assert tree.tokens[b].tolist() == oracle.tokens
        assert tree.parents[b].tolist() == oracle.parents
        assert tree.depth[b].tolist() == oracle.depth
        first = [c[0] if c else -1 for c in oracle.children]
        sibling = [-1] * N
        for c in oracle.children:
            assert c == sorted(c), "acceptance needs children in ascending order"
            for left, right in pairwise(c):
                sibling[left] = right
        assert tree.first_child[b].tolist() == first
        assert tree.next_sibling[b].tolist() == sibling
        for i in range(N):
            assert set(mask[b, i].nonzero()[:, 0].tolist()) == oracle.ancestors(i)
            assert i >= oracle.depth[i], "compaction needs ids that are never below their depth"
