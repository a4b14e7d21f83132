"""Captured launches follow their inputs: no mask, length or path of the capture survives a replay."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from dflash_kernels import (
    Accepted,
    DraftTree,
    KVCompactor,
    TreeAttentionWorkspace,
    accept_tree,
    build_tree,
    tree_attention,
)
from dflash_kernels._dispatch import interpreting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(interpreting() or not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BS, N, L, K, HQ, HKV, D, SLOTS = 3, 32, 7, 8, 8, 2, 64, 4096


class Step:
    """Static inputs and outputs of one tree step over a single layer."""

    def __init__(self) -> None:
        cuda = {"device": "cuda"}
        self.anchor = torch.zeros(BS, dtype=torch.int64, **cuda)
        self.logprobs = torch.zeros(BS, L, K, **cuda)
        self.ids = torch.zeros(BS, L, K, dtype=torch.int64, **cuda)
        self.target = torch.zeros(BS, N, dtype=torch.int64, **cuda)
        self.lens = torch.zeros(BS, dtype=torch.int64, **cuda)
        self.q = torch.zeros(BS * N, HQ, D, dtype=torch.bfloat16, **cuda)
        self.k_new = torch.zeros(BS * N, HKV, D, dtype=torch.bfloat16, **cuda)
        self.v_new = torch.zeros_like(self.k_new)
        self.k_cache = torch.zeros(SLOTS, HKV, D, dtype=torch.bfloat16, **cuda)
        self.v_cache = torch.zeros_like(self.k_cache)
        self.indptr = torch.zeros(BS + 1, dtype=torch.int32, **cuda)
        self.indices = torch.zeros(SLOTS, dtype=torch.int64, **cuda)
        self.slots = torch.zeros(BS, N, dtype=torch.int64, **cuda)
        self.tree = DraftTree.empty(BS, N, "cuda")
        self.accepted = Accepted.empty(BS, L, "cuda")
        self.out = torch.zeros_like(self.q)
        self.workspace = TreeAttentionWorkspace(BS, (N,), HQ, HKV, D, "cuda")
        self.compact = KVCompactor([self.k_cache, self.v_cache])

    def draw(self, lens: list[int]) -> None:
        """New contents at the same addresses."""
        self.logprobs.copy_((3 * torch.randn(BS, L, 64)).log_softmax(-1).topk(K).values)
        self.ids.copy_(torch.stack([torch.randperm(9)[:K] for _ in range(BS * L)]).view(BS, L, K))
        self.target.copy_(torch.randint(0, 9, (BS, N)))
        for t in (self.q, self.k_new, self.v_new, self.k_cache, self.v_cache):
            t.normal_()
        perm = torch.randperm(SLOTS)
        total = sum(lens)
        self.lens.copy_(torch.tensor(lens))
        self.indptr.copy_(torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()]))
        self.indices[:total].copy_(perm[:total])
        self.slots.copy_(perm[total : total + BS * N].view(BS, N))

    def run(self) -> None:
        build_tree(self.anchor, self.logprobs, self.ids, num_nodes=N, out=self.tree)
        tree_attention(
            self.q, self.k_new, self.v_new, self.k_cache, self.v_cache, self.indptr, self.indices,
            ancestors=self.tree.ancestors, depth=self.tree.depth, sm_scale=D**-0.5,
            out=self.out, workspace=self.workspace,
        )  # fmt: skip
        accept_tree(self.tree, self.target, self.lens, max_depth=L, out=self.accepted)
        self.compact(self.slots, self.accepted.path, self.accepted.accept_lens)

    def results(self) -> list[torch.Tensor]:
        tensors = [getattr(self.tree, f.name) for f in fields(self.tree)]
        tensors += [getattr(self.accepted, f.name) for f in fields(self.accepted)]
        return [t.clone() for t in (*tensors, self.out, self.k_cache, self.v_cache)]


def test_replay_equals_eager():
    step = Step()
    step.draw([40, 0, 700])
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):  # compile outside the capture
            step.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run()
    for lens in ([1, 1500, 3], [0, 0, 0], [900, 17, 1000]):
        step.draw(lens)
        before = step.k_cache.clone(), step.v_cache.clone()
        graph.replay()
        replayed = step.results()
        step.k_cache.copy_(before[0])
        step.v_cache.copy_(before[1])
        step.run()
        for a, b in zip(replayed, step.results(), strict=True):
            assert torch.equal(a, b)
