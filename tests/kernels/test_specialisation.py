"""What follows a step's width or its load compiles nothing: on a GPU that is a stall of seconds in a request.

Launches are caught before they reach a device, and Triton's own key of each is compared.
"""

from __future__ import annotations

import pytest
from dflash_kernels._dispatch import interpreting

if interpreting():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import torch
from dflash_kernels import Accepted, Chain, DraftTree, Race
from dflash_kernels.head_topk.kernel import draft_topk_triton
from dflash_kernels.kv_compact.kernel import PointerTable, compact_kv_triton
from dflash_kernels.recall.kernel import recall_triton
from dflash_kernels.tree_accept.kernel import accept_tree_triton
from dflash_kernels.tree_build.kernel import build_tree_triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

#: (requests, nodes, block) of steps; nodes of one word of ancestors, blocks of one power of two.
STEPS = ((1, 17, 12), (3, 18, 12), (4, 24, 14), (16, 32, 16))


@pytest.fixture
def keys(monkeypatch):
    """Kernel name -> the different keys it was launched with."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    found: dict[str, set] = {}

    def run(self, *args, grid, warmup, **kwargs):
        binder = create_function_from_signature(self.signature, self.params, backend)
        _, specialization, options = binder(*args, **kwargs)
        found.setdefault(self.fn.__name__, set()).add(f"{specialization} {sorted(options.items())}")

    monkeypatch.setattr(JITFunction, "run", run)
    return found


def test_a_step_of_another_width_compiles_nothing(keys):
    caches = PointerTable([torch.zeros(64, 2, 16, dtype=torch.bfloat16)])
    for bs, nodes, block in STEPS:
        depth, top = block - 1, 10  # rows of 10 candidates: strides are multiples of 16 only now and then
        logprobs, ids = torch.zeros(bs, depth, top), torch.zeros(bs, depth, top, dtype=torch.int64)
        anchor, lens = torch.zeros(bs, dtype=torch.int64), torch.zeros(bs, dtype=torch.int64)
        build_tree_triton(anchor, logprobs, ids, num_nodes=nodes)
        build_tree_triton(anchor, logprobs, ids, num_nodes=nodes, keep_spine=True)
        edges = torch.zeros(bs, depth, top, top)
        build_tree_triton(anchor, logprobs, ids, num_nodes=nodes, edges=edges)
        tree = DraftTree.empty(bs, nodes, "cpu")
        chain = Chain(torch.zeros(bs, nodes - 1, dtype=torch.int64), torch.zeros(bs, nodes - 1))
        build_tree_triton(anchor, logprobs, ids, num_nodes=nodes, chain=chain)
        target = torch.zeros(bs, nodes, dtype=torch.int64)
        accepted = Accepted.empty(bs, depth, "cpu")
        accept_tree_triton(tree, target, lens, max_depth=depth, out=accepted)
        slots = torch.zeros(bs, 40, dtype=torch.int64)[:, :nodes]
        compact_kv_triton(caches, slots, accepted.path, accepted.accept_lens)
        text = torch.zeros(bs, 4096, dtype=torch.int32)
        recall_triton(text, anchor, lens, count=nodes - 1, longest=4096, min_match=3, max_match=32)
    several = {name: len(found) for name, found in keys.items()}
    # With the spine kept and free; over edges and with a chain.
    assert several.pop("build_tree_kernel") == 2
    assert several.pop("build_lattice_kernel") == 2
    assert several == dict.fromkeys(
        ("accept_tree_kernel", "compact_kv_kernel", "scan_kernel", "continue_kernel"), 1
    )


def test_another_load_compiles_the_head_once_for_every_tile(keys):
    head = torch.zeros(5000, 64, dtype=torch.bfloat16)
    for rows in (1, 7, 16, 17, 32, 33, 64, 65, 240, 1000):
        draft_topk_triton(torch.zeros(rows, 64, dtype=torch.bfloat16), head, 16)
    assert len(keys["head_topk_kernel"]) == 3  # 16, 32 and 64 rows a program
    assert len(keys["merge_topk_kernel"]) == 1
    whole = torch.zeros(240, dtype=torch.int64)
    race = Race(whole, whole, torch.ones(240), torch.ones(240))
    draft_topk_triton(torch.zeros(240, 64, dtype=torch.bfloat16), head, 16, race=race)
    assert len(keys["head_topk_kernel"]) == 4


def test_the_catch_sees_a_constant_that_changes(keys):
    """K is compiled in, so two of them are two kernels: a key that never differed would prove nothing."""
    head = torch.zeros(5000, 64, dtype=torch.bfloat16)
    for k in (8, 16):
        draft_topk_triton(torch.zeros(16, 64, dtype=torch.bfloat16), head, k)
    assert len(keys["head_topk_kernel"]) == 2
