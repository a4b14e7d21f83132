"""The accept walk against a pointer-chasing oracle."""

from __future__ import annotations

import random
from dataclasses import fields

import pytest
import torch
from dflash_kernels import Accepted, accept_tree
from hypothesis import given
from hypothesis import strategies as st
from kernel_oracles import walk
from kernel_trees import to_device, tree_from_parents, trees


def check(accepted: Accepted, tree, target, prefix_lens, max_depth: int) -> None:
    for b in range(target.shape[0]):
        path = walk(
            tree.tokens[b].tolist(),
            tree.first_child[b].tolist(),
            tree.next_sibling[b].tolist(),
            target[b].tolist(),
            max_depth,
        )
        n = len(path)
        assert accepted.accept_lens[b] == n
        assert accepted.path[b].tolist() == path + [-1] * (max_depth + 1 - n)
        emitted = [int(target[b, i]) for i in path]
        assert accepted.out_tokens[b].tolist() == emitted + [0] * (max_depth + 1 - n)
        assert accepted.bonus[b] == emitted[-1]
        assert accepted.new_lens[b] == prefix_lens[b] + n


@given(tree=trees(), max_depth=st.integers(1, 12), seed=st.integers(0, 2**31), wide=st.booleans())
def test_equals_walk(backend, tree, max_depth, seed, wide):
    # A vocabulary of 4 makes long matches and duplicate siblings common.
    g = torch.Generator().manual_seed(seed)
    bs = tree.tokens.shape[0]
    target = torch.randint(0, 4, tree.tokens.shape, generator=g)
    prefix_lens = torch.randint(0, 9999, (bs,), generator=g, dtype=torch.int64 if wide else torch.int32)
    out = Accepted.empty(bs, max_depth, backend.device, prefix_lens.dtype)
    for f in fields(out):
        getattr(out, f.name).fill_(-77)
    result = backend.accept_tree(
        to_device(tree, backend.device),
        target.to(backend.device),
        prefix_lens.to(backend.device),
        max_depth=max_depth,
        out=out,
    )
    assert result is out
    assert result.new_lens.dtype == prefix_lens.dtype
    check(result, tree, target, prefix_lens, max_depth)


def test_whole_chain_of_128(backend):
    N = 128
    tokens = torch.arange(N)[None]
    tree = tree_from_parents([[-1, *range(N - 1)]], tokens, [N])
    target = (tokens + 1).to(backend.device)
    lens = torch.tensor([7], device=backend.device)
    accepted = backend.accept_tree(to_device(tree, backend.device), target, lens, max_depth=N - 1)
    assert accepted.path[0].tolist() == list(range(N))
    assert accepted.new_lens.tolist() == [7 + N]


def test_padding_with_the_wanted_token_is_not_entered(backend):
    tokens = torch.tensor([[5, 6, 5, 5]])
    tree = tree_from_parents([[-1, 0, 0, 0]], tokens, [2])
    target = torch.full((1, 4), 5)
    accepted = backend.accept_tree(
        to_device(tree, backend.device),
        target.to(backend.device),
        torch.tensor([3], device=backend.device),
        max_depth=3,
    )
    assert accepted.accept_lens.tolist() == [1]
    assert accepted.bonus.tolist() == [5]


def test_root_alone(backend):
    tree = tree_from_parents([[-1]], torch.tensor([[random.randrange(9)]]), [1])
    accepted = backend.accept_tree(
        to_device(tree, backend.device),
        torch.tensor([[42]], device=backend.device),
        torch.tensor([0], device=backend.device),
        max_depth=4,
    )
    assert accepted.out_tokens.tolist() == [[42, 0, 0, 0, 0]]


def test_rejects_misfit():
    tree = tree_from_parents([[-1, 0]], torch.tensor([[1, 2]]), [2])
    with pytest.raises(ValueError, match="must match the tree"):
        accept_tree(tree, torch.zeros(1, 3, dtype=torch.int64), torch.tensor([0]), max_depth=1)
