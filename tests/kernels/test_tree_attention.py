"""Tree attention against float64 attention one row at a time; everything unused is poisoned."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from dflash_kernels import ancestor_mask, torch_plan, tree_attention
from dflash_kernels._dispatch import interpreting
from dflash_kernels.tree_attn.configs import TileConfig
from hypothesis import given
from hypothesis import strategies as st
from kernel_oracles import dense_attention
from kernel_trees import tree_from_parents, trees

F32, F16, BF16, FP8 = torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn
SMALL = TileConfig(block_m=16, block_n=32, warps=4, stages=3, per_sm=1)


@dataclass
class Case:
    """One attention call; lens are prefix lengths, mask is tree, chain or block."""

    lens: list[int]
    N: int = 13
    Hkv: int = 2
    G: int = 2
    Dk: int = 16
    Dv: int = 16
    dtype: torch.dtype = F32
    kv_dtype: torch.dtype | None = None
    page: int = 1
    mask: str = "tree"
    window: int = -1
    logit_cap: float = 0.0
    with_sinks: bool = False
    k_scale: float = 1.0
    v_scale: float = 1.0
    splits: int = 2
    index_dtype: torch.dtype = torch.int64

    @property
    def sm_scale(self) -> float:
        return 0.7 * self.Dk**-0.5

    @property
    def both_ways(self) -> bool:
        return self.mask == "block"


def random_tree(bs: int, N: int):
    parents = [[-1, *(random.randrange(i) for i in range(1, N))] for _ in range(bs)]
    return tree_from_parents(parents, torch.zeros(bs, N, dtype=torch.int64), [N] * bs)


def paged_slots(lens: list[int], page: int) -> tuple[list[list[int]], int]:
    """Scattered pages per request, tokens in order within a page; slots in all (page 0 stays unused)."""
    need = [-(-n // page) for n in lens]
    pages = list(range(1, sum(need) + 3))
    random.shuffle(pages)
    slots = []
    for n, count in zip(lens, need, strict=True):
        mine = [pages.pop() for _ in range(count)]
        slots.append([mine[t // page] * page + t % page for t in range(n)])
    return slots, (sum(need) + 3) * page


class Inputs:
    """Tensors of a case, and the float64 answer."""

    def __init__(self, case: Case, device: str, tree=None) -> None:
        self.case = case
        bs = len(case.lens)
        kv_dtype = case.kv_dtype or case.dtype
        self.tree = tree or random_tree(bs, case.N)
        slots, rows = paged_slots(case.lens, case.page)
        used = torch.tensor([s for one in slots for s in one], dtype=torch.int64)
        self.q = torch.randn(bs * case.N, case.Hkv * case.G, case.Dk).to(case.dtype)
        self.k_new = torch.randn(bs * case.N, case.Hkv, case.Dk).to(case.dtype)
        self.v_new = torch.randn(bs * case.N, case.Hkv, case.Dv).to(case.dtype)
        # Rows of no request are NaN: reading one shows.
        self.k_cache = torch.full((rows, case.Hkv, case.Dk), float("nan"))
        self.v_cache = torch.full((rows, case.Hkv, case.Dv), float("nan"))
        self.k_cache[used] = torch.randn(len(used), case.Hkv, case.Dk)
        self.v_cache[used] = torch.randn(len(used), case.Hkv, case.Dv)
        self.k_cache, self.v_cache = self.k_cache.to(kv_dtype), self.v_cache.to(kv_dtype)
        self.indptr = torch.tensor([0, *torch.tensor(case.lens).cumsum(0).tolist()], dtype=torch.int32)
        # SGLang's index buffers are longer than what is used; the tail is out of range.
        self.indices = torch.cat([used, torch.full((5,), 2**30)]).to(case.index_dtype)
        self.sinks = torch.randn(case.Hkv * case.G) if case.with_sinks else None
        node = torch.arange(case.N)
        self.depth = self.tree.depth if case.mask == "tree" else node.int().expand(bs, -1)
        visible = {
            "tree": ancestor_mask(self.tree.ancestors, case.N),
            "chain": (node <= node[:, None]).expand(bs, -1, -1),
            "block": torch.ones(bs, case.N, case.N, dtype=torch.bool),
        }[case.mask]
        double = [t.double().numpy() for t in (self.q, self.k_new, self.v_new, self.k_cache, self.v_cache)]

        @dataclass
        class Spec:
            sm_scale = case.sm_scale
            logit_cap = case.logit_cap
            window = case.window
            both_ways = case.both_ways
            sinks = None if self.sinks is None else self.sinks.tolist()
            k_scale = case.k_scale
            v_scale = case.v_scale

        self.expected = torch.from_numpy(
            dense_attention(Spec, *double, case.lens, slots, visible.tolist(), self.depth.tolist())
        )
        self.device = device

    def call(self, fn, **extra) -> torch.Tensor:
        case, d = self.case, self.device
        out = torch.full(
            (self.q.shape[0], self.q.shape[1], case.Dv), float("nan"), dtype=case.dtype, device=d
        )
        tree = case.mask == "tree"
        result = fn(
            self.q.to(d),
            self.k_new.to(d),
            self.v_new.to(d),
            self.k_cache.to(d),
            self.v_cache.to(d),
            self.indptr.to(d),
            self.indices.to(d),
            ancestors=self.tree.ancestors.to(d) if tree else None,
            depth=self.tree.depth.to(d) if tree else None,
            causal=case.mask == "chain",
            sm_scale=case.sm_scale,
            logit_cap=case.logit_cap,
            sliding_window=case.window,
            sinks=None if self.sinks is None else self.sinks.to(d),
            k_scale=case.k_scale,
            v_scale=case.v_scale,
            out=out,
            **extra,
        )
        assert result is out
        return result

    def check(self, backend, **extra) -> None:
        if backend.name == "triton":
            extra = {"num_splits": self.case.splits, "config": SMALL, **extra}
        got = self.call(backend.tree_attention, **extra).cpu().double()
        # Errors of storing the output and, in 16 bits, of the probabilities and the score inputs.
        tolerance = {F32: 2e-5, F16: 4e-3, BF16: 3e-2}[self.case.dtype]
        torch.testing.assert_close(got, self.expected, atol=tolerance, rtol=tolerance)


CASES = {
    "ragged-0-1": Case([0, 1, 37]),
    "all-empty": Case([0, 0], splits=3),
    "one-node": Case([5, 40], N=1),
    "fused": Case([40, 3], splits=1),
    "idle-splits": Case([3, 300], splits=4, N=5, G=1),
    "node-count-33": Case([9], N=33, Hkv=1, splits=1),
    "page-16": Case([17, 31], page=16),
    "page-64": Case([65, 5], page=64, index_dtype=torch.int32),
    "group-of-3": Case([20, 33], G=3, N=7),
    "many-heads-per-kv": Case([21], G=8, N=6, Hkv=1),
    "no-grouping": Case([21], G=1, Hkv=3),
    "dim-96": Case([18], Dk=96, Dv=96, N=4, Hkv=1),
    "dims-differ": Case([18], Dk=48, Dv=32, N=6),
    "dim-256": Case([10], Dk=256, Dv=256, N=3, Hkv=1),
    "fp16": Case([30, 2], dtype=F16),
    "bf16": Case([30, 2], dtype=BF16),
    "fp8-scaled": Case([30, 2], dtype=BF16, kv_dtype=FP8, k_scale=0.25, v_scale=2.0),
    "fp8-scaled-fused": Case([30, 2], dtype=BF16, kv_dtype=FP8, k_scale=0.25, v_scale=2.0, splits=1),
    "soft-cap": Case([25, 7], logit_cap=1.5),
    "sinks": Case([25, 0], with_sinks=True),
    "sinks-fused": Case([25, 0], with_sinks=True, splits=1),
    "window-0": Case([25, 2], window=0),
    "window-short": Case([140, 2], window=4, splits=3),
    "window-longer-than-prefix": Case([14, 2], window=500),
    "window-chain": Case([140, 9], window=130, mask="chain", N=9),
    "window-block": Case([30, 9], window=3, mask="block", N=9),
    "everything": Case(
        [140, 1, 0], N=17, G=3, page=16, window=100, logit_cap=2.0, with_sinks=True, k_scale=0.5, v_scale=3.0
    ),
    "chain": Case([19, 4], mask="chain"),
    "draft-block": Case([19, 0], mask="block", N=8),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_dense(backend, name):
    random.seed(torch.initial_seed())
    Inputs(CASES[name], backend.device).check(backend)


@given(tree=trees(max_nodes=20), length=st.integers(0, 20), window=st.sampled_from([-1, 2, 15]))
def test_any_tree(backend, tree, length, window):
    bs, N = tree.tokens.shape
    case = Case([length + 3 * b for b in range(bs)], N=N, Hkv=1, G=2, window=window, splits=1 + length % 2)
    Inputs(case, backend.device, tree).check(backend)


def test_a_list_cut_to_the_window_gives_the_same(backend):
    """SGLang hands sliding-window layers only the last tokens of the prefix."""
    full = Inputs(Case([60], window=10, N=6), backend.device)
    extra = {"num_splits": 2, "config": SMALL} if backend.name == "triton" else {}
    expected = full.call(backend.tree_attention, **extra)
    full.indices = full.indices[60 - 10 :]
    full.indptr = torch.tensor([0, 10], dtype=torch.int32)
    cut = full.call(backend.tree_attention, **extra)
    torch.testing.assert_close(cut, expected, atol=2e-5, rtol=2e-5)


def test_number_of_splits_does_not_matter(backend):
    if backend.name != "triton":
        pytest.skip("the torch path has no splits")
    inputs = Inputs(Case([300, 40, 0], N=5, Hkv=1), backend.device)
    for splits in (1, 2, 5):
        inputs.check(backend, num_splits=splits)


def test_workspace_is_reused_and_may_be_dirty(backend):
    if backend.name != "triton":
        pytest.skip("the torch path has no workspace")
    from dflash_kernels import TreeAttentionWorkspace

    inputs = Inputs(Case([150, 20], N=5, Hkv=1), backend.device)
    workspace = TreeAttentionWorkspace(4, (5,), 2, 1, 16, backend.device)
    for buffer in (workspace.lse, workspace.out):
        buffer.fill_(float("nan"))
    inputs.check(backend, workspace=workspace)
    small = TreeAttentionWorkspace(1, (1,), 1, 1, 16, backend.device)
    small.lse, small.out = small.lse[:1], small.out[:1]
    with pytest.raises(ValueError, match="largest batch"):
        inputs.check(backend, workspace=small)


def test_stored_configurations_give_the_same(backend):
    """Without overrides: the tile table's entry and the planned number of splits."""
    inputs = Inputs(Case([70, 5], N=20, Hkv=1, G=2), backend.device)
    torch.testing.assert_close(
        inputs.call(backend.tree_attention).cpu().double(), inputs.expected, atol=2e-5, rtol=2e-5
    )


@pytest.mark.skipif(interpreting(), reason="the plan belongs to the torch path")
@pytest.mark.parametrize("mask", ["tree", "chain", "block"])
def test_shared_plan(mask):
    inputs = Inputs(Case([12, 0], mask=mask, window=5), "cpu")
    tree = mask == "tree"
    plan = torch_plan(
        inputs.indptr,
        inputs.indices,
        13,
        ancestors=inputs.tree.ancestors if tree else None,
        depth=inputs.tree.depth if tree else None,
        causal=mask == "chain",
        sliding_window=5,
    )
    got = inputs.call(tree_attention, plan=plan).double()
    torch.testing.assert_close(got, inputs.expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 2, 8)}, "not a multiple of the 2 requests"),
        ({"q": torch.zeros(2 * 129, 2, 8)}, "1..128"),
        ({"q": torch.zeros(4, 3, 8)}, "not a multiple of 2 KV heads"),
        ({"v_new": torch.zeros(5, 2, 8)}, "v_new is"),
        ({"k_cache": torch.zeros(9, 2, 4)}, "k_cache is"),
        ({"ancestors": torch.zeros(2, 2, 2, dtype=torch.int32)}, "ancestors is"),
        ({"ancestors": torch.zeros(2, 2, 1, dtype=torch.int32), "sliding_window": 4}, "needs depth"),
    ],
)
def test_rejects_misfits(change, message):
    call = {
        "q": torch.zeros(4, 2, 8),
        "k_new": torch.zeros(4, 2, 8),
        "v_new": torch.zeros(4, 2, 8),
        "k_cache": torch.zeros(9, 2, 8),
        "v_cache": torch.zeros(9, 2, 8),
        "kv_indptr": torch.tensor([0, 1, 2], dtype=torch.int32),
        "kv_indices": torch.tensor([1, 2]),
        "ancestors": None,
        "sm_scale": 1.0,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        tree_attention(**call)
