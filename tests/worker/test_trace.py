"""What a step tells of itself, without a server."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from dflash_kernels import Chain, accept_tree, build_tree
from dflash_kernels.tree import DraftTree

from sglang_dflash.step.timing import Laps
from sglang_dflash.step.trace import ANSWERED, Chances, StepTrace
from sglang_dflash.step.width import PLAIN, Width
from sglang_dflash.upstream.requests import traced_rows
from sglang_dflash.worker.draft import Candidates
from sglang_dflash.worker.tree.reach import chances


def drafted(bs: int = 2, depths: int = 4, top: int = 5) -> Candidates:
    logprobs = (2 * torch.randn(bs, depths, 50)).log_softmax(-1).topk(top, dim=-1)
    return Candidates(logprobs.values, logprobs.indices)


def built(candidates: Candidates, nodes: int, chain: Chain | None = None) -> DraftTree:
    anchor = torch.full((len(candidates.ids),), 99)
    return build_tree(anchor, candidates.logprobs, candidates.ids, num_nodes=nodes, chain=chain)


def commit(index: int, count: int) -> SimpleNamespace:
    return SimpleNamespace(output_index=index, token_ids=(0,) * count)


def test_a_nodes_chance_is_its_paths() -> None:
    candidates, nodes = drafted(), 9
    tree = built(candidates, nodes)
    got = chances(tree, candidates)
    assert got.count.tolist() == [9, 9]
    assert not got.recalled.any()
    for row in range(2):
        want = [1.0]
        for node in range(1, nodes):
            depth, parent = int(tree.depth[row, node]), int(tree.parents[row, node])
            rank = candidates.ids[row, depth - 1].tolist().index(int(tree.tokens[row, node]))
            want.append(want[parent] * float(candidates.logprobs[row, depth - 1, rank].exp()))
        assert got.path[row].tolist() == pytest.approx(want, abs=1e-6)


def test_padding_is_no_node() -> None:
    candidates = drafted(1, 2, 2)
    candidates.logprobs[:, :, 1] = float("-inf")
    assert chances(built(candidates, 8), candidates).count.tolist() == [3]


def test_a_recalled_path_is_marked() -> None:
    candidates = drafted(1)
    chain = Chain(torch.tensor([[60, 61]]), torch.tensor([[-0.1, -0.2]]))
    tree = built(candidates, 6, chain)
    got = chances(tree, candidates, chain)
    marked = {int(t) for t, on in zip(tree.tokens[0], got.recalled[0], strict=True) if on}
    assert {60, 61} <= marked


def traced(
    tree: DraftTree, said: Chances, target: torch.Tensor, width: Width, asked: list[bool]
) -> StepTrace:
    accepted = accept_tree(tree, target, torch.tensor([10] * len(target)), max_depth=width.nodes - 1)
    laps = Laps("cpu", enabled=True)
    for _ in range(7):
        laps.mark()
    return StepTrace(7, width, asked, tree, said, accepted, laps)


def test_only_who_asked_is_told_and_at_its_own_place() -> None:
    candidates, width = drafted(), Width(9, 5)
    tree = built(candidates, 9)
    target = torch.full_like(tree.tokens, 3)
    second = int(tree.first_child[1, 0])
    target[1, 0] = tree.tokens[1, second]  # one drafted token of the second request is right
    trace = traced(tree, chances(tree, candidates), target, width, [False, True])
    reqs = [SimpleNamespace(customized_info=None) for _ in range(2)]
    host = trace.copy_to_host(lambda tensor: tensor.clone())
    host.consume(SimpleNamespace(reqs=reqs), [commit(1, 1), commit(1, 2)])
    assert reqs[0].customized_info is None
    before, step, after = reqs[1].customized_info[ANSWERED]
    assert before is None
    assert after is None
    assert step["step"] == 7
    assert step["width"] == "9x5"
    assert step["path"] == [0, second]
    assert [node[0] for node in step["tree"]] == tree.tokens[1].tolist()
    assert [node[1] for node in step["tree"]] == tree.parents[1].tolist()
    assert len(step["ms"]) == 3
    host.consume(SimpleNamespace(reqs=reqs), [None, commit(3, 1)])
    assert [said is not None for said in reqs[1].customized_info[ANSWERED]] == [False, True, False, True]


def test_a_plain_step_tells_its_root() -> None:
    roots = DraftTree.roots(torch.tensor([5]))
    trace = traced(roots, Chances.of_roots(1, torch.device("cpu")), torch.tensor([[8]]), PLAIN, [True])
    step = trace.copy_to_host(lambda tensor: tensor).described(0)
    assert step["tree"] == [[5, -1, 1.0, False]]
    assert step["path"] == [0]
    assert step["width"] == "1x1"


def test_nobody_asks() -> None:
    def batch(*asked: dict | None) -> SimpleNamespace:
        params = [SimpleNamespace(custom_params=custom) for custom in asked]
        return SimpleNamespace(reqs=[SimpleNamespace(sampling_params=p) for p in params])

    assert traced_rows(batch(None, {}, {"answer": [1]}, {"dflash_trace": False})) is None
    assert traced_rows(batch(None, {"dflash_trace": True})) == [False, True]
