"""Tree attention on a paged KV cache: split prefix (stage 1), merge and draft block (stage 2).

Stage 1 packs all nodes of a request times the query heads of one KV head into the M tile, so each KV byte
is read once per row block instead of once per query head. The prefix is visible to every node, so it needs
no mask; the tree only exists in the N x N draft block, under one 32-bit ancestor word per node and 32
keys. With one split the stages fuse into one launch and no partial result touches memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dflash_kernels._dispatch import interpreting
from dflash_kernels.tree_attn.configs import (
    MIN_CHUNK,
    TileConfig,
    architecture,
    plan_splits,
    tile_config,
)
from dflash_kernels.tree_attn.workspace import TreeAttentionWorkspace

LOG2E = 1.4426950408889634
TREE, CAUSAL, FULL = 0, 1, 2


@triton.jit
def _to_log2(qk, scale, cap, HAS_CAP: tl.constexpr):
    """Scaled, soft-capped scores in log2 units."""
    if HAS_CAP:
        # tanh(x / cap) from the exponential that exists on every backend
        qk = cap * (2.0 / (1.0 + tl.exp(-2.0 * qk * scale / cap)) - 1.0)
        return qk * 1.4426950408889634
    return qk * (scale * 1.4426950408889634)


@triton.jit
def _online(s, v, m, l, acc, PRECISION: tl.constexpr):
    """One online-softmax step over scores s [BM, BN] (log2, -inf where masked) and values v [BN, BDV]."""
    m_new = tl.maximum(m, tl.max(s, axis=1))
    safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - safe[:, None])
    alpha = tl.exp2(m - safe)
    l = l * alpha + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return m_new, l, acc


@triton.jit
def _chunks(kv_indptr, b, SPLITS: tl.constexpr, WINDOW: tl.constexpr, MIN_CHUNK: tl.constexpr):
    """(first index slot, prefix length, first visible position, tokens per split) of a request."""
    start = tl.load(kv_indptr + b)
    length = tl.load(kv_indptr + b + 1) - start
    low = start * 0
    if WINDOW >= 0:
        low = tl.maximum(length - WINDOW, 0)
    share = (length - low + SPLITS - 1) // SPLITS
    return start, length, low, tl.maximum((share + MIN_CHUNK - 1) // MIN_CHUNK, 1) * MIN_CHUNK


@triton.jit
def _draft_block(
    q,
    m,
    l,
    acc,
    b,
    head,
    row_node,
    row_depth,
    k_new,
    v_new,
    anc,
    depth_ptr,
    scale,
    cap,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    N: tl.constexpr,
    WORDS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BDK: tl.constexpr,
    BDV: tl.constexpr,
    BLOCK: tl.constexpr,
    MASK: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_DEPTH: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the draft block to the softmax state; BLOCK is 16 or 32, so a row needs one word per step."""
    dk = tl.arange(0, BDK)
    dv = tl.arange(0, BDV)
    for j in range(0, N, BLOCK):
        key = j + tl.arange(0, BLOCK)
        inside = key < N
        t = b * N + key
        k = tl.load(
            k_new + t[:, None] * stride_kt + head * stride_kh + dk[None, :],
            mask=inside[:, None] & (dk < DK)[None, :],
            other=0.0,
        )
        v = tl.load(
            v_new + t[:, None] * stride_vt + head * stride_vh + dv[None, :],
            mask=inside[:, None] & (dv < DV)[None, :],
            other=0.0,
        )
        s = _to_log2(tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION), scale, cap, HAS_CAP)
        visible = inside[None, :]
        if MASK == 0:
            word = tl.load(anc + (b * N + row_node) * WORDS + j // 32)
            visible = visible & (((word[:, None] >> (key & 31)[None, :]) & 1) == 1)
        elif MASK == 1:
            visible = visible & (key[None, :] <= row_node[:, None])
        if WINDOW >= 0:
            key_depth = tl.load(depth_ptr + t, mask=inside, other=0) if HAS_DEPTH else key
            gap = row_depth[:, None] - key_depth[None, :]
            if MASK == 2:
                gap = tl.abs(gap)
            visible = visible & (gap <= WINDOW)
        s = tl.where(visible, s, float("-inf"))
        m, l, acc = _online(s, v.to(q.dtype), m, l, acc, PRECISION)
    return m, l, acc


@triton.jit
def _finish(
    m,
    l,
    acc,
    head,
    row_group,
    row_mask,
    sinks,
    out_ptrs,
    dv,
    DV: tl.constexpr,
    G: tl.constexpr,
    HAS_SINK: tl.constexpr,
):
    """Adds the sinks to the denominator and writes the rows."""
    if HAS_SINK:
        sink = tl.load(sinks + head * G + row_group).to(tl.float32) * 1.4426950408889634
        top = tl.maximum(m, sink)
        shrink = tl.exp2(m - top)
        l = l * shrink + tl.exp2(sink - top)
        acc = acc * shrink[:, None]
    out = acc / l[:, None]
    tl.store(out_ptrs, out.to(out_ptrs.dtype.element_ty), mask=row_mask[:, None] & (dv < DV)[None, :])


@triton.jit
def prefix_kernel(
    q_ptr,
    k_new,
    v_new,
    k_cache,
    v_cache,
    kv_indptr,
    kv_indices,
    anc,
    depth_ptr,
    sinks,
    out_ptr,
    part_o,
    part_lse,
    sm_scale,
    k_scale,
    v_scale,
    cap,
    stride_qt,
    stride_qh,
    stride_knt,
    stride_knh,
    stride_vnt,
    stride_vnh,
    stride_ks,
    stride_kh,
    stride_vs,
    stride_vh,
    stride_ot,
    stride_oh,
    N: tl.constexpr,
    G: tl.constexpr,
    HKV: tl.constexpr,
    WORDS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BDK: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    MASK: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_DEPTH: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINK: tl.constexpr,
    FUSED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # Row blocks of one (head, split) are neighbours in launch order: they share its KV through L2.
    row_block = tl.program_id(0)
    head = tl.program_id(1) // SPLITS
    split = tl.program_id(1) % SPLITS
    b = tl.program_id(2)
    start, length, low, chunk = _chunks(kv_indptr, b, SPLITS, WINDOW, MIN_CHUNK)
    begin = low + split * chunk
    end = tl.minimum(begin + chunk, length)
    if not FUSED:  # noqa: SIM102 - a compile-time branch around a run-time one
        if begin >= end:
            return

    ROWS: tl.constexpr = N * G
    row = row_block * BM + tl.arange(0, BM)
    row_mask = row < ROWS
    row_node = tl.minimum(row // G, N - 1)
    row_group = row % G
    dk = tl.arange(0, BDK)
    dv = tl.arange(0, BDV)
    q = tl.load(
        q_ptr
        + (b * N + row_node)[:, None] * stride_qt
        + (head * G + row_group)[:, None] * stride_qh
        + dk[None, :],
        mask=row_mask[:, None] & (dk < DK)[None, :],
        other=0.0,
    )
    if UPCAST:
        q = q.to(tl.float32)
    row_depth = row_node
    if HAS_DEPTH:
        row_depth = tl.load(depth_ptr + b * N + row_node)

    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)
    k_base = k_cache + head * stride_kh + dk[None, :]
    v_base = v_cache + head * stride_vh + dv[None, :]
    offs = tl.arange(0, BN)
    for pos in range(begin, end, BN):
        at = pos + offs
        inside = at < end
        slot = tl.load(kv_indices + start + at, mask=inside, other=0).to(tl.int64)
        k = tl.load(k_base + slot[:, None] * stride_ks, mask=inside[:, None] & (dk < DK)[None, :], other=0.0)
        s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
        s = _to_log2(s, sm_scale * k_scale, cap, HAS_CAP)
        visible = inside[None, :]
        if WINDOW >= 0:
            visible = visible & (length + row_depth[:, None] - at[None, :] <= WINDOW)
        s = tl.where(visible, s, float("-inf"))
        v = tl.load(v_base + slot[:, None] * stride_vs, mask=inside[:, None] & (dv < DV)[None, :], other=0.0)
        m, l, acc = _online(s, v.to(q.dtype), m, l, acc, PRECISION)

    acc = acc * v_scale
    if FUSED:
        m, l, acc = _draft_block(
            q, m, l, acc, b, head, row_node, row_depth, k_new, v_new, anc, depth_ptr, sm_scale, cap,
            stride_knt, stride_knh, stride_vnt, stride_vnh, N, WORDS, DK, DV, BDK, BDV, BLOCK, MASK, WINDOW,
            HAS_DEPTH, HAS_CAP, PRECISION,
        )  # fmt: skip
        out_ptrs = (
            out_ptr
            + (b * N + row_node)[:, None] * stride_ot
            + (head * G + row_group)[:, None] * stride_oh
            + dv[None, :]
        )
        _finish(m, l, acc, head, row_group, row_mask, sinks, out_ptrs, dv, DV, G, HAS_SINK)
    else:
        cell = ((b * HKV + head) * SPLITS + split).to(tl.int64) * ROWS + row
        norm = tl.where(l > 0.0, l, 1.0)
        tl.store(part_lse + cell, tl.where(l > 0.0, m + tl.log2(norm), float("-inf")), mask=row_mask)
        tl.store(
            part_o + cell[:, None] * DV + dv[None, :],
            acc / norm[:, None],
            mask=row_mask[:, None] & (dv < DV)[None, :],
        )


@triton.jit
def merge_kernel(
    q_ptr,
    k_new,
    v_new,
    kv_indptr,
    anc,
    depth_ptr,
    sinks,
    out_ptr,
    part_o,
    part_lse,
    sm_scale,
    cap,
    stride_qt,
    stride_qh,
    stride_knt,
    stride_knh,
    stride_vnt,
    stride_vnh,
    stride_ot,
    stride_oh,
    N: tl.constexpr,
    G: tl.constexpr,
    HKV: tl.constexpr,
    WORDS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BDK: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    MASK: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_DEPTH: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINK: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row_block = tl.program_id(0)
    head = tl.program_id(1)
    b = tl.program_id(2)
    ROWS: tl.constexpr = N * G
    row = row_block * BM + tl.arange(0, BM)
    row_mask = row < ROWS
    row_node = tl.minimum(row // G, N - 1)
    row_group = row % G
    dk = tl.arange(0, BDK)
    dv = tl.arange(0, BDV)
    q = tl.load(
        q_ptr
        + (b * N + row_node)[:, None] * stride_qt
        + (head * G + row_group)[:, None] * stride_qh
        + dk[None, :],
        mask=row_mask[:, None] & (dk < DK)[None, :],
        other=0.0,
    )
    if UPCAST:
        q = q.to(tl.float32)
    row_depth = row_node
    if HAS_DEPTH:
        row_depth = tl.load(depth_ptr + b * N + row_node)
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)
    m, l, acc = _draft_block(
        q, m, l, acc, b, head, row_node, row_depth, k_new, v_new, anc, depth_ptr, sm_scale, cap,
        stride_knt, stride_knh, stride_vnt, stride_vnh, N, WORDS, DK, DV, BDK, BDV, BLOCK, MASK, WINDOW,
        HAS_DEPTH, HAS_CAP, PRECISION,
    )  # fmt: skip

    _, length, low, chunk = _chunks(kv_indptr, b, SPLITS, WINDOW, MIN_CHUNK)
    for split in range(tl.cdiv(length - low, chunk)):  # idle splits wrote nothing
        cell = ((b * HKV + head) * SPLITS + split).to(tl.int64) * ROWS + row
        lse = tl.load(part_lse + cell, mask=row_mask, other=float("-inf"))
        o = tl.load(
            part_o + cell[:, None] * DV + dv[None, :], mask=row_mask[:, None] & (dv < DV)[None, :], other=0.0
        )
        m_new = tl.maximum(m, lse)
        safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m - safe)
        weight = tl.exp2(lse - safe)
        acc = acc * alpha[:, None] + o * weight[:, None]
        l = l * alpha + weight
        m = m_new
    out_ptrs = (
        out_ptr
        + (b * N + row_node)[:, None] * stride_ot
        + (head * G + row_group)[:, None] * stride_oh
        + dv[None, :]
    )
    _finish(m, l, acc, head, row_group, row_mask, sinks, out_ptrs, dv, DV, G, HAS_SINK)


MERGE_BLOCK_M = 16


def tree_attention_triton(
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
    num_splits: int | None = None,
    config: TileConfig | None = None,
) -> torch.Tensor:
    """Same contract as `dflash_kernels.tree_attention`; `num_splits` and `config` override the stored plan.

    No host synchronisation, and the launch depends on shapes only: safe to capture in a CUDA graph.
    """
    bs = kv_indptr.shape[0] - 1
    tokens, Hq, DK = q.shape
    N, Hkv, DV = tokens // bs, k_new.shape[1], v_new.shape[2]
    G = Hq // Hkv
    rows = N * G
    if (
        k_cache.dtype == torch.float8_e4m3fn
        and q.is_cuda
        and torch.cuda.get_device_capability(q.device) < (8, 9)
    ):
        raise ValueError(
            "an fp8 e4m3 KV cache needs compute capability 8.9 or later; use --kv-cache-dtype auto"
        )
    config = config or tile_config(architecture(q.device), max(DK, DV), rows, k_cache.element_size())
    splits = num_splits or plan_splits(bs, Hkv, rows, config, q.device)
    out = q.new_empty(tokens, Hq, DV) if out is None else out
    fused = splits == 1
    part_o = part_lse = out
    if not fused:
        cells = bs * Hkv * splits * rows
        if workspace is not None:
            part_o, part_lse = workspace.buffers(cells, DV)
        else:
            part_o = torch.empty(cells * DV, dtype=torch.float32, device=q.device)
            part_lse = torch.empty(cells, dtype=torch.float32, device=q.device)
    shared = {
        "N": N,
        "G": G,
        "HKV": Hkv,
        "WORDS": (N + 31) // 32,
        "DK": DK,
        "DV": DV,
        "BDK": max(triton.next_power_of_2(DK), 16),
        "BDV": max(triton.next_power_of_2(DV), 16),
        "BLOCK": 16 if N <= 16 else 32,
        "SPLITS": splits,
        "MIN_CHUNK": max(MIN_CHUNK, config.block_n),
        "MASK": TREE if ancestors is not None else CAUSAL if causal else FULL,
        "WINDOW": sliding_window,
        "HAS_DEPTH": depth is not None,
        "HAS_CAP": logit_cap > 0,
        "HAS_SINK": sinks is not None,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "UPCAST": interpreting(),  # the interpreter multiplies bf16 as if it were integers
    }
    anc = ancestors if ancestors is not None else kv_indptr
    dep = depth if depth is not None else kv_indptr
    snk = sinks if sinks is not None else q
    prefix_kernel[(triton.cdiv(rows, config.block_m), Hkv * splits, bs)](
        q, k_new, v_new, k_cache, v_cache, kv_indptr, kv_indices, anc, dep, snk, out, part_o, part_lse,
        sm_scale, float(k_scale), float(v_scale), float(logit_cap),
        q.stride(0), q.stride(1), k_new.stride(0), k_new.stride(1), v_new.stride(0), v_new.stride(1),
        k_cache.stride(0), k_cache.stride(1), v_cache.stride(0), v_cache.stride(1),
        out.stride(0), out.stride(1),
        BM=config.block_m, BN=config.block_n, FUSED=fused, **shared,
        num_warps=config.fused_warps if fused else config.warps, num_stages=config.stages,
    )  # fmt: skip
    if not fused:
        merge_kernel[(triton.cdiv(rows, MERGE_BLOCK_M), Hkv, bs)](
            q, k_new, v_new, kv_indptr, anc, dep, snk, out, part_o, part_lse,
            sm_scale, float(logit_cap),
            q.stride(0), q.stride(1), k_new.stride(0), k_new.stride(1), v_new.stride(0), v_new.stride(1),
            out.stride(0), out.stride(1),
            BM=MERGE_BLOCK_M, **shared, num_warps=4, num_stages=2,
        )  # fmt: skip
    return out
