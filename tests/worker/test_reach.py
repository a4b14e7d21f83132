"""What the drafter expects of its tree, against trees built one by one."""

from __future__ import annotations

import math

import pytest
import torch
from dflash_kernels import Chain, build_tree

from sglang_dflash.step.selector import edges_of
from sglang_dflash.worker.draft import Candidates
from sglang_dflash.worker.tree.reach import reach


def drafted(bs: int, depths: int, top: int, seed: int) -> Candidates:
    g = torch.Generator().manual_seed(seed)
    logprobs = (2 * torch.randn(bs, depths, 50, generator=g)).log_softmax(-1).topk(top, dim=-1)
    return Candidates(logprobs.values, logprobs.indices)


def expected(one: Candidates, row: int, nodes: int) -> list[float]:
    """Sum by depth of the path probabilities of one request's tree of ``nodes`` nodes."""
    anchor = torch.tensor([99])
    tree = build_tree(anchor, one.logprobs[row : row + 1], one.ids[row : row + 1], num_nodes=nodes)
    sums = [0.0] * one.ids.shape[1]
    chance = {0: 1.0}
    for node in range(1, nodes):
        depth, parent = int(tree.depth[0, node]), int(tree.parents[0, node])
        rank = one.ids[row, depth - 1].tolist().index(int(tree.tokens[0, node]))
        chance[node] = chance[parent] * float(one.logprobs[row, depth - 1, rank].exp())
        sums[depth - 1] += chance[node]
    return sums


@pytest.mark.parametrize("nodes", [2, 7, 12])
def test_reach_is_the_sum_over_each_smaller_tree(nodes: int) -> None:
    candidates = drafted(5, 4, 6, seed=nodes)
    tree = build_tree(torch.full((5,), 99), candidates.logprobs, candidates.ids, num_nodes=nodes)
    tiers = [t for t in (1, 2, 3, 4, 6, 8, 12) if t <= nodes]
    sampled = torch.tensor([False, True, False, True, True])
    got = reach(tree, candidates, tiers, sampled)
    assert got.shape == (2, len(tiers), 4)
    for t, tier in enumerate(tiers):
        for kind in (0, 1):
            rows = [row for row in range(5) if bool(sampled[row]) == bool(kind)]
            want = [
                sum(column) for column in zip(*(expected(candidates, r, tier) for r in rows), strict=True)
            ]
            assert got[kind, t].tolist() == pytest.approx(want, abs=1e-5)


def test_padding_and_impossible_candidates_count_nothing() -> None:
    candidates = drafted(1, 2, 2, seed=0)
    candidates.logprobs[0, :, 1] = float("-inf")
    # The anchor's own token is a candidate: padding nodes carry it.
    anchor = candidates.ids[0, :1, 0].clone()
    tree = build_tree(anchor, candidates.logprobs, candidates.ids, num_nodes=8)
    first, second = candidates.logprobs[0, :, 0].exp().tolist()
    got = reach(tree, candidates, [1, 2, 8], None)
    assert got[0].tolist() == [
        [0.0, 0.0],
        pytest.approx([first, 0.0]),
        pytest.approx([first, first * second]),
    ]
    assert (got[1] == 0).all()


def test_recalled_nodes_count_by_their_own_probabilities() -> None:
    """The first is also the drafter's, the second only the chain's, the third lies beyond the block."""
    candidates = drafted(2, 2, 3, seed=3)
    path = [int(candidates.ids[0, 0, 2]), 70, 71]
    own, never = [-0.1, -0.2, -0.3], float("-inf")
    chain = Chain(torch.tensor([path, path]), torch.tensor([own, [never] * 3]))
    tree = build_tree(torch.full((2,), 99), candidates.logprobs, candidates.ids, num_nodes=9, chain=chain)
    assert int(tree.depth[0].max()) == 3
    sums = [0.0, 0.0]
    prefixes, chance = {0: []}, {0: 1.0}
    for node in range(1, 9):
        depth, parent = int(tree.depth[0, node]), int(tree.parents[0, node])
        prefixes[node] = [*prefixes[parent], int(tree.tokens[0, node])]
        if prefixes[node] == path[:depth]:
            chance[node] = chance[parent] * math.exp(own[depth - 1])
        else:
            rank = candidates.ids[0, depth - 1].tolist().index(prefixes[node][-1])
            chance[node] = chance[parent] * float(candidates.logprobs[0, depth - 1, rank].exp())
        if depth <= 2:
            sums[depth - 1] += chance[node]
    got = reach(tree, candidates, [2, 9], None, chain)[0]
    other = expected(candidates, 1, 9)
    assert got[1].tolist() == pytest.approx([a + b for a, b in zip(sums, other, strict=True)], abs=1e-5)
    assert float(got[0, 0]) == pytest.approx(math.exp(-0.1) + float(candidates.logprobs[1, 0, 0].exp()))


def test_nodes_of_a_selector_count_given_their_parents() -> None:
    plain = drafted(2, 3, 4, seed=9)
    g = torch.Generator().manual_seed(1)
    edges = edges_of(plain.logprobs, torch.randn(2, 3, 4, 4, generator=g))
    edges[:, 0] = edges[:, 0, :1]
    candidates = Candidates(plain.logprobs, plain.ids, edges)
    tree = build_tree(
        torch.full((2,), 99), candidates.logprobs, candidates.ids, num_nodes=10, edges=candidates.edges
    )
    want = [0.0] * 3
    for row in range(2):
        rank, chance = {0: 0}, {0: 1.0}
        for node in range(1, 10):
            depth, parent = int(tree.depth[row, node]), int(tree.parents[row, node])
            rank[node] = candidates.ids[row, depth - 1].tolist().index(int(tree.tokens[row, node]))
            chance[node] = chance[parent] * float(edges[row, depth - 1, rank[parent], rank[node]].exp())
            want[depth - 1] += chance[node]
    assert reach(tree, candidates, [10], None)[0, 0].tolist() == pytest.approx(want, abs=1e-5)
