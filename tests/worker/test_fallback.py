"""A drafter that returns NaN: one verified token for that request, nothing for its neighbours to notice."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from dflash_kernels import DraftTree, accept_tree

from sglang_dflash.step.report import FALLBACK, outcome
from sglang_dflash.step.width import Step, Width
from sglang_dflash.upstream.drafter_cache import clean_drafter_cache
from sglang_dflash.worker.draft import Candidates
from sglang_dflash.worker.health import DrafterHealth
from sglang_dflash.worker.tree import TreeStage

BS, DEPTH, TOP, VOCAB = 4, 5, 3, 50
NAN, INF = float("nan"), float("inf")


def draw() -> Candidates:
    drafted = torch.log_softmax(torch.randn(BS, DEPTH, VOCAB), -1).topk(TOP)
    return Candidates(drafted.values, drafted.indices)


def build(candidates: Candidates, nodes: int):
    width = Width(nodes=nodes, block=DEPTH + 1)
    anchor, lens = torch.arange(BS), torch.full((BS,), 9)
    step = Step(width, anchor=anchor, prefix_lens=lens, slots=lens, plan=None, host_lens=lens)
    return TreeStage(depth_bonus=None, rewrite=None, device="cpu")(candidates, step, None)[0]


def accept_everything(tree):
    """A target that follows the first child wherever there is one."""
    children = tree.first_child.long()
    wanted = torch.where(children >= 0, tree.tokens.gather(1, children.clamp(min=0)), 0)
    return accept_tree(tree, wanted, torch.full((BS,), 9), max_depth=DEPTH)


@pytest.mark.parametrize("nodes", [2, DEPTH, DEPTH + 1, 20])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda row: row.fill_(NAN),
        lambda row: row[2:].fill_(NAN),
        lambda row: row[DEPTH - 1, TOP - 1].fill_(NAN),
        lambda row: row[0, 0].fill_(INF),
    ],
    ids=["block", "tail", "one", "inf"],
)
def test_a_broken_draft_is_one_token_and_leaves_the_batch_alone(nodes: int, spoil) -> None:
    candidates = draw()
    sound = build(candidates, nodes)
    broken = Candidates(candidates.logprobs.clone(), candidates.ids)
    spoil(broken.logprobs[1])
    tree = build(broken, nodes)
    others = [0, 2, 3]
    for name in ("tokens", "parents", "depth", "first_child", "next_sibling", "ancestors"):
        assert torch.equal(getattr(tree, name)[others], getattr(sound, name)[others])
    assert bool(((tree.tokens >= 0) & (tree.tokens < VOCAB)).all())
    accepted = accept_everything(tree)
    assert int(accepted.accept_lens[1]) == 1
    assert torch.equal(accepted.accept_lens[others], accept_everything(sound).accept_lens[others])
    assert bool((accepted.accept_lens[others] > 1).all())
    assert outcome(tree, accepted).tolist() == [0, FALLBACK, 0, 0]


def test_a_plain_step_is_no_fallback() -> None:
    anchor = torch.tensor([5, 6])
    tree = DraftTree.roots(anchor)
    accepted = accept_tree(tree, anchor[:, None], anchor, max_depth=0)
    assert outcome(tree, accepted).tolist() == [0, 0]


def test_rows_moved_are_the_nodes_off_the_spine() -> None:
    candidates = Candidates(
        torch.tensor([[-0.1, -2.4], [-0.1, -2.4], [-0.1, -2.4]]).repeat(BS, 1, 1),
        torch.arange(6).view(1, 3, 2).repeat(BS, 1, 1),
    )
    width = Width(nodes=15, block=4)
    lens = torch.full((BS,), 9)
    step = Step(width, anchor=lens, prefix_lens=lens, slots=lens, plan=None, host_lens=lens)
    tree = TreeStage(depth_bonus=None, rewrite=None, device="cpu")(candidates, step, None)[0]
    # Rank taken at each depth by the target: spine, off at depth 1, off at depth 3, off at the root only.
    ranks = [[0, 0, 0], [1, 0, 0], [0, 0, 1], [1, None, None]]
    want = torch.full((BS, 15), 99)
    for row, path in enumerate(ranks):
        node = 0
        for depth, rank in enumerate(path):
            if rank is None:
                break
            token = int(candidates.ids[row, depth, rank])
            want[row, node] = token
            children = (tree.parents[row] == node) & (tree.depth[row] == depth + 1)
            node = int((children & (tree.tokens[row] == token)).nonzero()[0])
    accepted = accept_tree(tree, want, lens, max_depth=3)
    assert accepted.accept_lens.tolist() == [4, 4, 4, 2]
    assert outcome(tree, accepted).tolist() == [0, 3, 1, 1]


def test_the_cache_is_cleaned_once_per_illness() -> None:
    health = DrafterHealth()
    health.note(0, 0)
    assert not health.must_clean(1)
    health.note(1, 2)  # arrives while step 2 runs
    assert health.must_clean(3)
    health.note(2, 1)  # launched before the cleaning: the same illness
    assert not health.must_clean(4)
    health.note(3, 0)
    health.note(9, 1)  # another illness, after recovery
    assert health.must_clean(10)
    assert (health.fallbacks, health.cleanings) == (4, 2)


def test_a_drafter_that_stays_broken_is_not_cleaned_in_every_step() -> None:
    health = DrafterHealth()
    cleanings = 0
    for step in range(5000):
        cleanings += health.must_clean(step)
        health.note(step, 1)
    assert health.fallbacks == 5000
    assert 3 < cleanings < 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cleaning_touches_nothing_else(dtype: torch.dtype) -> None:
    sound = [torch.randn(6, 2, 4).to(dtype) for _ in range(4)]
    ill = [buffer.clone() for buffer in sound]
    for buffer, value in zip(ill, (NAN, INF, -INF, NAN), strict=True):
        buffer[3, 1, 2] = value
    pool = SimpleNamespace(k_buffer=ill[:2], v_buffer=ill[2:])
    clean_drafter_cache(SimpleNamespace(token_to_kv_pool=pool))
    for before, after in zip(sound, ill, strict=True):
        before[3, 1, 2] = 0
        assert torch.equal(before, after)
