"""Tree build against a heap in plain Python."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from dflash_kernels import DraftTree, ancestor_mask, build_tree
from hypothesis import given
from hypothesis import strategies as st
from kernel_trees import assert_equal_to_heap, candidates


@given(
    bs=st.integers(1, 3),
    L=st.integers(1, 8),
    K=st.integers(1, 8),
    N=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    step=st.sampled_from([None, 0.5, 2.0]),
    bonus_scale=st.sampled_from([None, 0.3, 3.0]),
    holes=st.sampled_from([None, float("nan"), float("-inf")]),
    keep_spine=st.booleans(),
    ascending=st.booleans(),
)
def test_equals_heap(backend, bs, L, K, N, seed, step, bonus_scale, holes, keep_spine, ascending):
    anchor, logprobs, ids = candidates(bs, L, K, seed, step)
    g = torch.Generator().manual_seed(seed + 1)
    if ascending:  # against the contract: a rank then counts as no likelier than the one before it
        logprobs = logprobs.flip(2).contiguous()
    bonus = None if bonus_scale is None else bonus_scale * torch.randn(L, generator=g)
    if holes is not None:
        logprobs[torch.rand(logprobs.shape, generator=g) < 0.15] = holes
    dev = backend.device
    tree = backend.build_tree(
        anchor.to(dev),
        logprobs.to(dev),
        ids.to(dev),
        num_nodes=N,
        depth_bonus=None if bonus is None else bonus.to(dev),
        keep_spine=keep_spine,
    )
    assert_equal_to_heap(tree, anchor, logprobs, ids, N, bonus, keep_spine)


@pytest.mark.parametrize("N", [33, 64, 100, 128])
def test_large_budget_equals_heap(backend, N):
    anchor, logprobs, ids = candidates(2, 15, 16, seed=torch.seed() % 2**31)
    dev = backend.device
    tree = backend.build_tree(anchor.to(dev), logprobs.to(dev), ids.to(dev), num_nodes=N)
    assert_equal_to_heap(tree, anchor, logprobs, ids, N, None, False)


def test_with_a_kept_spine_the_smaller_budget_is_a_prefix(backend):
    anchor, logprobs, ids = (t.to(backend.device) for t in candidates(2, 5, 6, seed=torch.seed() % 2**31))
    big = backend.build_tree(anchor, logprobs, ids, num_nodes=30, keep_spine=True)
    small = backend.build_tree(anchor, logprobs, ids, num_nodes=17, keep_spine=True)
    assert torch.equal(small.parents, big.parents[:, :17])
    assert torch.equal(small.tokens, big.tokens[:, :17])


def test_spine_has_id_equal_to_depth(backend):
    # A flat second choice that beats the deep spine: only keep_spine brings the chain in.
    logprobs = torch.tensor([[-0.7, -0.7], [-5.0, -9.0], [-5.0, -9.0]])[None].to(backend.device)
    ids = torch.arange(6).view(1, 3, 2).to(backend.device)
    anchor = torch.tensor([9], device=backend.device)
    tree = backend.build_tree(anchor, logprobs, ids, num_nodes=4, keep_spine=True)
    assert tree.depth[0].tolist() == [0, 1, 2, 3]
    assert tree.tokens[0].tolist() == [9, 0, 2, 4]
    free = backend.build_tree(anchor, logprobs, ids, num_nodes=4)
    assert free.depth[0].tolist() == [0, 1, 2, 1]
    assert free.parents[0].tolist() == [-1, 0, 1, 0]


def test_fills_given_buffers(backend):
    anchor, logprobs, ids = (t.to(backend.device) for t in candidates(2, 4, 4, seed=torch.seed() % 2**31))
    fresh = backend.build_tree(anchor, logprobs, ids, num_nodes=13)
    out = DraftTree.empty(2, 13, backend.device)
    for f in fields(out):
        getattr(out, f.name).fill_(-77)
    addresses = [getattr(out, f.name).data_ptr() for f in fields(out)]
    result = backend.build_tree(anchor, logprobs, ids, num_nodes=13, out=out)
    assert result is out
    for f, address in zip(fields(out), addresses, strict=True):
        assert getattr(out, f.name).data_ptr() == address
        assert torch.equal(getattr(out, f.name), getattr(fresh, f.name)), f.name


def test_padding_is_unreachable(backend):
    anchor, logprobs, ids = (t.to(backend.device) for t in candidates(1, 2, 1, seed=torch.seed() % 2**31))
    tree = backend.build_tree(anchor, logprobs, ids, num_nodes=9)
    reached = set(tree.first_child[0].tolist()) | set(tree.next_sibling[0].tolist())
    assert reached == {-1, 1, 2}
    assert tree.parents[0, 3:].tolist() == [0] * 6
    assert tree.depth[0, 3:].tolist() == [1] * 6
    assert (tree.tokens[0, 3:] == anchor[0]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_nodes": 0}, "num_nodes must be 1..128"),
        ({"num_nodes": 129}, "num_nodes must be 1..128"),
        ({"depth_bonus": torch.zeros(3)}, "depth_bonus must be"),
        ({"anchor": torch.zeros(5, dtype=torch.int64)}, "anchor must be"),
        ({"topk_ids": torch.zeros(1, 4, 3, dtype=torch.int64)}, "topk_logprobs"),
    ],
)
def test_rejects_misfits(change, message):
    anchor, logprobs, ids = candidates(1, 4, 4, seed=0)
    call = {"anchor": anchor, "topk_logprobs": logprobs, "topk_ids": ids, "num_nodes": 8, **change}
    with pytest.raises(ValueError, match=message):
        build_tree(call.pop("anchor"), call.pop("topk_logprobs"), call.pop("topk_ids"), **call)


def test_ancestor_mask_reads_bit_31():
    words = torch.tensor([[[-(2**31), 1]]], dtype=torch.int32)
    assert np.flatnonzero(ancestor_mask(words, 33)[0, 0].numpy()).tolist() == [31, 32]
