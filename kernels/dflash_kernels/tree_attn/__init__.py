"""Attention of draft-tree nodes over a paged prefix and over the tree itself."""

from __future__ import annotations

from typing import Any

import torch

from dflash_kernels._dispatch import use_triton
from dflash_kernels.tree import num_words
from dflash_kernels.tree_attn.reference import TorchPlan, torch_plan
from dflash_kernels.tree_attn.workspace import TreeAttentionWorkspace

__all__ = ["TorchPlan", "TreeAttentionWorkspace", "torch_plan", "tree_attention"]

MAX_NODES = 128


def tree_attention(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    *,
    ancestors: torch.Tensor | None,
    sm_scale: float,
    depth: torch.Tensor | None = None,
    causal: bool = False,
    logit_cap: float = 0.0,
    sliding_window: int = -1,
    sinks: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out: torch.Tensor | None = None,
    workspace: TreeAttentionWorkspace | None = None,
    plan: TorchPlan | None = None,
) -> torch.Tensor:
    """Every node attends to its request's whole prefix and, within the draft block, to its ancestors.

    The position of node i is prefix + depth[i]. With a sliding window w >= 0 a key is visible when
    query position - key position <= w, SGLang's convention (`layer.sliding_window_size`), so a prefix list
    that was already cut to the window works unchanged.

    Args:
        q: [bs * N, Hq, Dk] bf16, fp16 or fp32; N = q.shape[0] / bs, 1..128.
        k_new, v_new: [bs * N, Hkv, Dk], [bs * N, Hkv, Dv], the nodes' own rows, q's dtype, unscaled.
        k_cache, v_cache: [slots, Hkv, Dk], [slots, Hkv, Dv], q's dtype or float8_e4m3fn / float8_e5m2.
        kv_indptr: int32 [bs + 1], bounds of each request's part of kv_indices.
        kv_indices: int32 or int64 [>= kv_indptr[-1]], slots of the prefix tokens in order (any page size).
        ancestors: int32 [bs, N, ceil(N / 32)] words (see `DraftTree`); None makes the block all-visible (the
            drafter's bidirectional pass) or a chain with `causal`.
        sm_scale: factor on q . k.
        depth: int32 [bs, N]; needed with a sliding window over a tree; None means depth = node index.
        causal: with ancestors None, node i sees nodes 0..i.
        logit_cap: > 0 applies cap * tanh(x / cap) to the scaled scores.
        sliding_window: < 0 is none. With ancestors None and not causal it bounds both directions.
        sinks: float32 [Hq], a per-head logit that only joins the softmax's denominator.
        k_scale, v_scale: factors that restore cached keys and values (not k_new, v_new).
        out: [bs * N, Hq, Dv] to fill.
        workspace: `TreeAttentionWorkspace` of the Triton path; None allocates one for the call.
        plan: `torch_plan(...)` of the same step, which saves the CPU path redoing masks in every layer.

    Returns:
        [bs * N, Hq, Dv], q's dtype.

    Raises:
        ValueError: shapes do not fit together, or the device cannot read the cache's type.
    """
    bs = kv_indptr.shape[0] - 1
    _check(q, k_new, v_new, k_cache, v_cache, bs, ancestors, depth, sliding_window)
    common: dict[str, Any] = dict(  # noqa: C408
        ancestors=ancestors,
        sm_scale=sm_scale,
        depth=depth,
        causal=causal,
        logit_cap=logit_cap,
        sliding_window=sliding_window,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
        out=out,
    )
    args = (q, k_new, v_new, k_cache, v_cache, kv_indptr, kv_indices)
    if use_triton(q):
        from dflash_kernels.tree_attn.kernel import tree_attention_triton

        return tree_attention_triton(*args, **common, workspace=workspace)
    from dflash_kernels.tree_attn.reference import tree_attention_torch

    return tree_attention_torch(*args, **common, plan=plan)


def _check(q, k_new, v_new, k_cache, v_cache, bs, ancestors, depth, sliding_window) -> None:
    rows, Hq, Dk = q.shape
    Hkv, Dv = v_new.shape[1:]
    if bs < 1 or rows % bs:
        raise ValueError(f"q has {rows} rows, which is not a multiple of the {bs} requests in kv_indptr")
    N = rows // bs
    if not 1 <= N <= MAX_NODES:
        raise ValueError(f"nodes per request must be 1..{MAX_NODES}, not {N}")
    if Hq % Hkv:
        raise ValueError(f"{Hq} query heads are not a multiple of {Hkv} KV heads")
    for name, t, shape in (
        ("k_new", k_new, (rows, Hkv, Dk)),
        ("v_new", v_new, (rows, Hkv, Dv)),
        ("k_cache", k_cache, (k_cache.shape[0], Hkv, Dk)),
        ("v_cache", v_cache, (k_cache.shape[0], Hkv, Dv)),
    ):
        if tuple(t.shape) != shape:
            raise ValueError(f"{name} is {tuple(t.shape)}, expected {shape}")
    if ancestors is not None and tuple(ancestors.shape) != (bs, N, num_words(N)):
        raise ValueError(f"ancestors is {tuple(ancestors.shape)}, expected {(bs, N, num_words(N))}")
    if ancestors is not None and sliding_window >= 0 and depth is None:
        raise ValueError("a sliding window over a tree needs depth: node order is not position order")
