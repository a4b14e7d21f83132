"""Tree build over edges and chains against a heap in plain Python."""

from __future__ import annotations

import random
from dataclasses import fields

import pytest
import torch
from dflash_kernels import Chain, DraftTree, build_tree
from dflash_kernels._dispatch import interpreting
from hypothesis import given
from hypothesis import strategies as st
from kernel_seed import SEED
from kernel_trees import assert_equal_to_heap, candidates, to_device

HOLES = [float("nan"), float("-inf"), float("inf"), 0.0]


def rounded(logprobs: torch.Tensor, step: float | None) -> torch.Tensor:
    """Multiples of `step`, so that scores tie."""
    return (logprobs / step).round() * step if step else logprobs


def random_edges(ids: torch.Tensor, g: torch.Generator, step: float | None) -> torch.Tensor:
    bs, L, K = ids.shape
    return rounded((2 * torch.randn(bs, L, K, max(K, 2), generator=g)).log_softmax(-1)[..., :K], step)


def random_chain(ids: torch.Tensor, D: int, g: torch.Generator, agree: float, step: float | None) -> Chain:
    """A chain whose tokens are candidates of their depth in a share `agree` of the cases."""
    bs, L, K = ids.shape
    token = torch.randint(0, 1994, (bs, D), generator=g)  # half of the others are no candidate of any depth
    for d in range(min(L, D)):
        # Mostly the first ranks, where chain and tree meet.
        rank = (torch.rand(bs, 1, generator=g) ** 2 * K).long()
        own = torch.rand(bs, generator=g) < agree
        token[:, d] = torch.where(own, ids[:, d].gather(1, rank)[:, 0], token[:, d])
    return Chain(token, rounded(-(torch.rand(bs, D, generator=g) ** 3) * 4, step))


def punch(values: torch.Tensor, g: torch.Generator, hole: float, share: float) -> None:
    values[torch.rand(values.shape, generator=g) < share] = hole


def lattice(rng: random.Random, *, bs: int, L: int, K: int, N: int, D: int | None, edged: bool) -> dict:
    """Arguments of `build_tree` with everything in them that bit equality has to survive."""
    g = torch.Generator().manual_seed(rng.randrange(2**31))
    step = rng.choice([None, None, 0.25, 1.0])
    anchor, logprobs, ids = candidates(bs, L, K, rng.randrange(2**31), step)
    edges = random_edges(ids, g, step) if edged else None
    chain = None if D is None else random_chain(ids, D, g, rng.random(), step)
    hole = rng.choice([None, *HOLES])
    if hole is not None:
        punch(logprobs, g, hole, 0.1)
        if edges is not None:
            punch(edges, g, hole, 0.1)
        if chain is not None:
            punch(chain.logprobs, g, hole, 0.1)
    bonus = rng.choice([None, 0.3, 3.0])
    return {
        "anchor": anchor,
        "topk_logprobs": logprobs,
        "topk_ids": ids,
        "num_nodes": N,
        "depth_bonus": None if bonus is None else bonus * torch.randn(L, generator=g),
        "keep_spine": rng.random() < 0.3,
        "edges": edges,
        "chain": chain,
    }


def moved(value: object, device: str) -> object:
    if isinstance(value, Chain):
        return Chain(*(t.to(device) for t in value))
    return value.to(device) if isinstance(value, torch.Tensor) else value


def run(backend, case: dict, **change) -> DraftTree:
    case = {name: moved(value, backend.device) for name, value in {**case, **change}.items()}
    return backend.build_tree(case.pop("anchor"), case.pop("topk_logprobs"), case.pop("topk_ids"), **case)


def check(backend, case: dict) -> None:
    tree = run(backend, case)
    assert_equal_to_heap(tree, **case)


def assert_same(a: DraftTree, b: DraftTree) -> None:
    for f in fields(a):
        assert torch.equal(getattr(a, f.name), getattr(b, f.name)), f.name


@given(
    bs=st.integers(1, 1 if interpreting() else 3),
    L=st.integers(0, 8),
    K=st.integers(1, 8),
    N=st.integers(1, 20 if interpreting() else 40),
    D=st.none() | st.integers(0, 24),
    edged=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_heap(backend, bs, L, K, N, D, edged, seed):
    check(backend, lattice(random.Random(seed), bs=bs, L=L, K=K, N=N, D=D, edged=edged))


def loop(backend, rounds: int) -> None:
    rng = random.Random(SEED)
    for _ in range(rounds):
        D = rng.choice([None, rng.randint(1, 20)])
        sizes = {"L": rng.randint(0, 7), "K": rng.randint(1, 8), "N": rng.randint(1, 24)}
        check(backend, lattice(rng, bs=1, D=D, edged=D is None or rng.random() < 0.5, **sizes))


def test_random_lattices(backend):
    loop(backend, 10 if interpreting() else 500)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_random_lattices(backend):
    loop(backend, 500 if interpreting() else 10_000)


@pytest.mark.parametrize(("N", "edged"), [(33, False), (128, True)])
def test_large_budget_equals_heap(backend, N, edged):
    rng = random.Random(SEED + N)
    check(backend, lattice(rng, bs=1, L=15, K=32, N=N, D=N - 1, edged=edged))


def test_edges_that_say_what_the_positions_say_change_nothing(backend):
    anchor, logprobs, ids = candidates(1, 6, 7, seed=SEED)
    case = {"anchor": anchor, "topk_logprobs": logprobs, "topk_ids": ids, "num_nodes": 20}
    edges = logprobs[:, :, None].expand(-1, -1, 7, -1)
    assert_same(run(backend, case), run(backend, case, edges=edges))
    assert_same(run(backend, case), run(backend, case, edges=edges.contiguous()))


def test_a_chain_that_is_over_changes_nothing(backend):
    rng = random.Random(SEED)
    for edged in (False, True):
        case = lattice(rng, bs=2, L=5, K=4, N=8, D=None, edged=edged)
        over = torch.tensor([[float("-inf"), 0.0, 0.0], [float("nan"), 0.0, 0.0]])
        assert_same(run(backend, case), run(backend, case, chain=Chain(case["topk_ids"][:, :3, 0], over)))


def test_inputs_that_are_slices(backend):
    """Of wider buffers, and of other types than the kernels read."""
    case = lattice(random.Random(SEED), bs=2, L=4, K=3, N=12, D=6, edged=True)
    wide = {
        "topk_ids": torch.nn.functional.pad(case["topk_ids"], (2, 1, 1, 0))[:, 1:, 2:-1],
        "edges": torch.nn.functional.pad(case["edges"], (1, 2, 0, 3))[:, :, :3, 1:4],
        "chain": Chain(
            torch.nn.functional.pad(case["chain"].ids.int(), (3, 2))[:, 3:-2],
            torch.nn.functional.pad(case["chain"].logprobs.double(), (1, 4))[:, 1:-4],
        ),
    }
    assert_same(run(backend, case), run(backend, {**case, **wide}))


def one(tokens: list[list[int]], probs: list[list[float]], N: int, **more) -> dict:
    """One request with anchor 9."""
    return {
        "anchor": torch.tensor([9]),
        "topk_logprobs": torch.tensor([probs]).log(),
        "topk_ids": torch.tensor([tokens]),
        "num_nodes": N,
        **more,
    }


def test_the_spine_follows_the_edges(backend):
    """The second depth's likeliest candidate is not the first one's likeliest successor."""
    edges = torch.tensor([[[[0.6, 0.4], [0.5, 0.5]], [[0.3, 0.7], [0.9, 0.1]]]]).log()
    case = one([[1, 2], [3, 4]], [[0.6, 0.4], [0.7, 0.3]], 5, edges=edges)
    tree = run(backend, case)
    # 1: 0.6, 1-4: 0.42, 2: 0.4, 2-3: 0.36.
    assert tree.tokens[0].tolist() == [9, 1, 4, 2, 3]
    assert tree.parents[0].tolist() == [-1, 0, 1, 0, 3]
    # The best of a depth need not follow the best of the one above: the spine is each node's best child.
    edges[0, 1] = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    tree = run(backend, {**case, "num_nodes": 4, "edges": edges})
    assert tree.tokens[0].tolist() == [9, 1, 2, 3]  # 0.6, 0.4, 0.36
    tree = run(backend, {**case, "num_nodes": 3, "edges": edges, "keep_spine": True})
    assert tree.tokens[0].tolist() == [9, 1, 3]


def test_a_bonus_that_evens_scores_leaves_the_rows_order(backend):
    """Both children reach log-probability 0; the likelier one stays the first."""
    edges = torch.tensor([[[[0.3, 0.6], [0.5, 0.5]]]]).log()
    case = one([[1, 2]], [[0.5, 0.5]], 3, edges=edges, depth_bonus=torch.tensor([5.0]))
    assert run(backend, case).tokens[0].tolist() == [9, 2, 1]


def test_a_shared_token_is_one_node_with_the_chains_probability(backend):
    chain = Chain(torch.tensor([[2, 3, 7]]), torch.tensor([[0.9, 0.8, 0.5]]).log())
    case = one([[1, 2], [3, 4]], [[0.6, 0.4], [0.7, 0.3]], 7, chain=chain)
    tree = run(backend, case)
    # 2: 0.9, 2-3: 0.72, 1: 0.6, 1-3: 0.42, 2-3-7: 0.36 (alone beyond the block), 2-4: 0.27.
    assert tree.tokens[0].tolist() == [9, 2, 3, 7, 1, 3, 4]
    assert tree.parents[0].tolist() == [-1, 0, 1, 2, 0, 4, 1]
    assert tree.first_child[0].tolist() == [1, 2, 3, -1, 5, -1, -1]
    assert tree.next_sibling[0].tolist() == [-1, 4, 6, -1, -1, -1, -1]


def test_below_a_token_that_is_no_candidate(backend):
    """It has no row: its children are the position's, and only the chain's next token is its own."""
    chain = Chain(torch.tensor([[8, 4]]), torch.tensor([[0.9, 0.5]]).log())
    edges = torch.full((1, 2, 2, 2), 0.01).log()
    case = one([[1, 2], [3, 4]], [[0.6, 0.4], [0.7, 0.3]], 4, chain=chain, edges=edges)
    tree = run(backend, case)
    # 8: 0.9, 8-3: 0.63, 8-4: 0.45, the chain's.
    assert tree.tokens[0].tolist() == [9, 8, 3, 4]
    assert tree.parents[0].tolist() == [-1, 0, 1, 1]
    assert tree.first_child[0].tolist() == [1, 2, -1, -1]


def test_a_chain_without_a_drafter(backend):
    chain = Chain(
        torch.tensor([[5, 6, 7], [5, 6, 7]]), torch.tensor([[0.0, -0.5, -9.0], [-1.0, float("-inf"), 0]])
    )
    empty = torch.zeros(2, 0, 4)
    tree = run(
        backend,
        {"anchor": torch.tensor([1, 2]), "topk_logprobs": empty, "topk_ids": empty.long()},
        num_nodes=5,
        chain=chain,
    )
    assert tree.tokens.tolist() == [[1, 5, 6, 7, 1], [2, 5, 2, 2, 2]]
    assert tree.depth.tolist() == [[0, 1, 2, 3, 1], [0, 1, 1, 1, 1]]
    assert tree.first_child.tolist() == [[1, 2, 3, -1, -1], [1, -1, -1, -1, -1]]
    bare = run(
        backend,
        {"anchor": torch.tensor([1, 2]), "topk_logprobs": empty, "topk_ids": empty.long()},
        num_nodes=5,
    )
    assert bare.tokens.tolist() == [[1] * 5, [2] * 5]
    assert bare.first_child.max() == -1


def test_no_two_siblings_share_a_token(backend):
    """Acceptance follows the first sibling whose token matches."""
    rng = random.Random(SEED)
    for edged in (False, True):
        linked = 0
        for _ in range(1 if interpreting() else 30):
            tree = to_device(run(backend, lattice(rng, bs=1, L=6, K=5, N=20, D=8, edged=edged)), "cpu")
            for i in range(20):
                below, at = [], int(tree.first_child[0, i])
                while at >= 0:
                    below.append(int(tree.tokens[0, at]))
                    at = int(tree.next_sibling[0, at])
                assert len(set(below)) == len(below)
                linked += len(below)
        assert linked > 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edges": torch.zeros(1, 4, 4, 3)}, r"edges must be \[1, 4, 4, 4\]"),
        ({"chain": (torch.zeros(1, 3).long(), torch.zeros(1, 4))}, "chain's ids"),
        ({"chain": (torch.zeros(2, 3).long(), torch.zeros(2, 3))}, "chain's ids"),
        (
            {"topk_logprobs": torch.zeros(1, 4, 255), "topk_ids": torch.zeros(1, 4, 255).long()},
            "at most 254 candidates",
        ),
    ],
)
def test_rejects_misfits(change, message):
    anchor, logprobs, ids = candidates(1, 4, 4, seed=0)
    call = {"anchor": anchor, "topk_logprobs": logprobs, "topk_ids": ids, "num_nodes": 8, **change}
    with pytest.raises(ValueError, match=message):
        build_tree(call.pop("anchor"), call.pop("topk_logprobs"), call.pop("topk_ids"), **call)
