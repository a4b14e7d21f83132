"""SGLang's kernels for linear attention, given our trees: does a state branch as the tree does?

Hybrid targets go to the chain until a GPU has served them by trees (docs/guarantees.md). What such a server
rests on is shown here, in the interpreter or on a CUDA device: `causal_conv1d_update` and the recurrences of
the gated delta rule and of Mamba2, which take a tree by its links and keep a window and a state for every
node, against each path computed alone, as plain decoding would. The state to commit is the accepted node's,
on the spine or off it.
"""

from __future__ import annotations

import random
from contextlib import nullcontext

import pytest
import torch
from dflash_kernels._dispatch import interpreting
from kernel_trees import tree_from_parents
from torch.nn import functional as F

if not (interpreting() or torch.cuda.is_available()):
    pytest.skip("needs Triton: see test_interpreter.py", allow_module_level=True)

from sglang.kernels.ops.attention.linear.fused_sigmoid_gating_recurrent import (
    fused_sigmoid_gating_delta_rule_update,
)
from sglang.kernels.ops.mamba.causal_conv1d_triton import causal_conv1d_update
from sglang.kernels.ops.mamba.triton_ops.mamba_ssm import selective_state_update

DEVICE = "cpu" if interpreting() else "cuda"
SLOTS = 5


def paths(parents: list[int]) -> list[list[int]]:
    """Of every node the ids from the root to it."""
    found: list[list[int]] = []
    for node, parent in enumerate(parents):
        found.append([*(found[parent] if node else []), node])
    return found


def tree_of(seed: int, nodes: int, bs: int = 2):
    draw = random.Random(seed)
    parents = [[0, *(draw.randrange(node) for node in range(1, nodes))] for _ in range(bs)]
    return parents, tree_from_parents(parents, torch.zeros(bs, nodes, dtype=torch.int64), [nodes] * bs)


@pytest.mark.parametrize(("seed", "nodes"), [(0, 4), (1, 8), (2, 13), (3, 16)])
@torch.no_grad()
def test_a_convolution_sees_its_own_path(seed: int, nodes: int) -> None:
    dim, width = 12, 4
    parents, tree = tree_of(seed, nodes)
    bs = len(parents)
    state = torch.randn(SLOTS, dim, width - 1, device=DEVICE)
    x = torch.randn(bs, dim, nodes, device=DEVICE)
    weight, bias = torch.randn(dim, width, device=DEVICE), torch.randn(dim, device=DEVICE)
    slots = torch.tensor([3, 1], dtype=torch.int32, device=DEVICE)
    windows = torch.zeros(bs, nodes, dim, width - 1, device=DEVICE)
    kept = state.clone()
    got = causal_conv1d_update(
        x.clone(),
        state,
        weight,
        bias,
        "silu",
        conv_state_indices=slots,
        intermediate_conv_window=windows,
        intermediate_state_indices=torch.arange(bs, dtype=torch.int32, device=DEVICE),
        retrieve_next_token=tree.first_child.to(DEVICE).long(),
        retrieve_next_sibling=tree.next_sibling.to(DEVICE).long(),
        retrieve_parent_token=torch.empty(bs, nodes, dtype=torch.int64, device=DEVICE),
    )
    # The pool's own window now holds anything: the commit writes the accepted node's over it.
    for row in range(bs):
        for node, path in enumerate(paths(parents[row])):
            seen = torch.cat([kept[slots[row]], x[row][:, path]], 1)[:, -width:]
            want = F.silu((seen * weight).sum(1) + bias)
            torch.testing.assert_close(got[row, :, node], want)
            torch.testing.assert_close(windows[row, node], seen[:, 1:])


def delta_rule(state, q, k, v, a, b, A_log, dt_bias, scale):
    """One token of the gated delta rule. state: [HV, V, K]."""
    gate = -A_log.exp() * F.softplus(a + dt_bias)
    group = v.shape[0] // q.shape[0]
    q, k = (
        (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).repeat_interleave(group, 0) for x in (q, k)
    )
    state = state * gate.exp()[:, None, None]
    new = (v - torch.einsum("hvk,hk->hv", state, k)) * b.sigmoid()[:, None]
    state = state + new[:, :, None] * k[:, None]
    return state, torch.einsum("hvk,hk->hv", state, q * scale)


@pytest.mark.parametrize(("seed", "nodes"), [(0, 4), (1, 8), (2, 13), (3, 16)])
@torch.no_grad()
def test_a_recurrent_state_follows_its_own_path(seed: int, nodes: int) -> None:
    heads, value_heads, dim = 2, 4, 16
    parents, _ = tree_of(seed + 10, nodes)
    bs = len(parents)
    rows = bs * nodes
    q, k = (torch.randn(1, rows, heads, dim, device=DEVICE) for _ in range(2))
    v = torch.randn(1, rows, value_heads, dim, device=DEVICE)
    a, b = (torch.randn(rows, value_heads, device=DEVICE) for _ in range(2))
    A_log, dt_bias = torch.randn(value_heads, device=DEVICE), torch.randn(value_heads, device=DEVICE)
    pool = torch.randn(SLOTS, value_heads, dim, dim, device=DEVICE)
    slots = torch.tensor([2, 4], dtype=torch.int32, device=DEVICE)
    states = torch.zeros(bs, nodes, value_heads, dim, dim, device=DEVICE)
    kept = pool.clone()
    parent = torch.tensor(parents, device=DEVICE)
    got = fused_sigmoid_gating_delta_rule_update(
        A_log=A_log,
        dt_bias=dt_bias,
        q=q,
        k=k,
        v=v,
        a=a,
        b=b,
        initial_state_source=pool,
        initial_state_indices=slots,
        cu_seqlens=torch.arange(0, rows + 1, nodes, dtype=torch.int32, device=DEVICE),
        use_qk_l2norm_in_kernel=True,
        softplus_beta=1.0,
        softplus_threshold=20.0,
        is_kda=False,
        disable_state_update=True,
        intermediate_states_buffer=states,
        intermediate_state_indices=torch.arange(bs, dtype=torch.int32, device=DEVICE),
        cache_steps=nodes,
        retrieve_parent_token=parent.clamp(min=0),
    ).view(bs, nodes, value_heads, dim)
    assert torch.equal(pool, kept), "a verify pass commits nothing"
    for row in range(bs):
        for node, path in enumerate(paths(parents[row])):
            state = kept[slots[row]]
            for step in path:
                at = row * nodes + step
                state, said = delta_rule(
                    state, q[0, at], k[0, at], v[0, at], a[at], b[at], A_log, dt_bias, dim**-0.5
                )
            torch.testing.assert_close(got[row, node], said, rtol=1e-4, atol=1e-4)
            # What a tree has to commit is the accepted node's state: no other is the path's.
            torch.testing.assert_close(states[row, node], state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("seed", "nodes"), [(0, 4), (2, 13)])
@torch.no_grad()
def test_a_mamba2_state_follows_its_own_path(seed: int, nodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The launcher makes the tensor's device current; a CPU knows no such thing.
    monkeypatch.setattr(torch.cpu, "device", lambda index: nullcontext(), raising=False)
    heads, dim, states, groups = 4, 8, 16, 2
    parents, _ = tree_of(seed + 20, nodes)
    bs = len(parents)
    x, z = (torch.randn(bs, nodes, heads, dim, device=DEVICE) for _ in range(2))
    # As Mamba2 gives them: one step size and one decay a head.
    dt = torch.randn(bs, nodes, heads, 1, device=DEVICE).expand(-1, -1, -1, dim)
    decay = -torch.rand(heads, 1, 1, device=DEVICE).expand(-1, dim, states)
    skip, bias = (torch.randn(heads, 1, device=DEVICE).expand(-1, dim) for _ in range(2))
    b, c = (torch.randn(bs, nodes, groups, states, device=DEVICE) for _ in range(2))
    pool = torch.randn(SLOTS, heads, dim, states, device=DEVICE)
    slots = torch.tensor([2, 4], dtype=torch.int32, device=DEVICE)
    found = torch.zeros(bs, nodes, heads, dim, states, device=DEVICE)
    kept, got = pool.clone(), torch.empty_like(x)
    selective_state_update(
        pool,
        x,
        dt,
        decay,
        b,
        c,
        skip,
        z=z,
        dt_bias=bias,
        dt_softplus=True,
        state_batch_indices=slots,
        out=got,
        disable_state_update=True,
        intermediate_states_buffer=found,
        cache_steps=nodes,
        retrieve_parent_token=torch.tensor(parents, device=DEVICE),
        intermediate_state_indices=torch.arange(bs, dtype=torch.int32, device=DEVICE),
    )
    assert torch.equal(pool, kept), "a verify pass commits nothing"
    for row in range(bs):
        for node, path in enumerate(paths(parents[row])):
            state = kept[slots[row]]
            for step in path:
                size = F.softplus(dt[row, step] + bias)
                b_of, c_of = (t[row, step].repeat_interleave(heads // groups, 0) for t in (b, c))
                state = state * (size[..., None] * decay).exp()
                state = state + (size * x[row, step])[..., None] * b_of[:, None]
            said = torch.einsum("hds,hs->hd", state, c_of) + skip * x[row, node]
            torch.testing.assert_close(got[row, node], said * F.silu(z[row, node]), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found[row, node], state, rtol=1e-4, atol=1e-4)
