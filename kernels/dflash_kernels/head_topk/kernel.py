"""Draft top-K without the logits: a matmul whose epilogue keeps K candidates and a log-sum-exp per row.

A program multiplies a block of rows with its span of the vocabulary, tile by tile, and carries per row the
K best so far and the running (maximum, sum). Only K candidates per row and span reach memory; a second
kernel merges the spans. Candidates are 64-bit keys (ordered logit bits, then the lower id), so the order is
total and the result does not depend on the tiling.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dflash_kernels._dispatch import interpreting
from dflash_kernels.gumbel import Race
from dflash_kernels.gumbel.kernel import exponential
from dflash_kernels.tree_attn.configs import sm_count

BLOCK_V, BLOCK_H = 128, 64
WARPS = 8  # four would spill in the top-K of a 64-row tile


def stages(KP: int) -> int:
    """Pipeline depth for a padded K; on sm_80 the wider top-K of 64 rows leaves no registers for a fourth."""
    return 3 if KP > 16 else 4


_MERGE_CHUNK = 1024


@triton.jit
def _pack(logits, col):
    """Keys whose integer order is (logit descending, column ascending) from the top."""
    bits = (logits + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - col.to(tl.int64))


@triton.jit
def _unpack(key):
    """(logit, column) of a key."""
    ordered = (key >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True), 0xFFFFFFFF - (key & 0xFFFFFFFF)


@triton.jit(do_not_specialize=["T", "spans", "tiles_per_span", "vocab_start"])
def head_topk_kernel(
    hidden_ptr,
    weight_ptr,
    keys_ptr,
    max_ptr,
    sum_ptr,
    seeds_ptr,
    positions_ptr,
    scale_ptr,
    strength_ptr,
    T,
    V,
    H,
    spans,
    tiles_per_span,
    vocab_start,
    cap,
    stride_h,
    stride_w,
    KP: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BH: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_RACE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # Row blocks of one span are neighbours in launch order: they share the span's weights through L2.
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    span = tl.program_id(1)
    row_mask = row < T
    cols = tl.arange(0, BV)
    hs = tl.arange(0, BH)
    best = tl.full([BT, KP], -0x8000000000000000, tl.int64)
    m = tl.full([BT], float("-inf"), tl.float32)
    total = tl.zeros([BT], tl.float32)
    if HAS_RACE:
        seed = tl.load(seeds_ptr + row, mask=row_mask, other=0)
        position = tl.load(positions_ptr + row, mask=row_mask, other=0)
        scale = tl.load(scale_ptr + row, mask=row_mask, other=1.0)
        strength = tl.load(strength_ptr + row, mask=row_mask, other=0.0)
    first = span * tiles_per_span
    for tile in range(first, tl.minimum(first + tiles_per_span, tl.cdiv(V, BV))):
        col = tile * BV + cols
        col_mask = col < V
        acc = tl.zeros([BT, BV], tl.float32)
        for h0 in range(0, H, BH):
            h = h0 + hs
            x = tl.load(
                hidden_ptr + row[:, None].to(tl.int64) * stride_h + h[None, :],
                mask=row_mask[:, None] & (h < H)[None, :],
                other=0.0,
            )
            w = tl.load(
                weight_ptr + col[:, None].to(tl.int64) * stride_w + h[None, :],
                mask=col_mask[:, None] & (h < H)[None, :],
                other=0.0,
            )
            if UPCAST:
                x = x.to(tl.float32)
                w = w.to(tl.float32)
            acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
        if HAS_CAP:
            acc = cap * (2.0 / (1.0 + tl.exp(-2.0 * acc / cap)) - 1.0)
        if HAS_RACE:
            acc = acc * scale[:, None]
        acc = tl.where(col_mask[None, :], acc, float("-inf"))
        # NaN ranks as -inf, so that padding columns never win; it stays in the sum and so in log_z.
        ranked = tl.where(acc == acc, acc, float("-inf"))
        m_new = tl.maximum(m, tl.max(ranked, axis=1))
        total = total * tl.exp(m - m_new) + tl.sum(tl.exp(acc - m_new[:, None]), axis=1)
        m = m_new
        if HAS_RACE:
            noise = exponential(seed[:, None], position[:, None], (vocab_start + col)[None, :])
            ranked = ranked - strength[:, None] * tl.log(noise)
        fresh = tl.topk(_pack(ranked, col[None, :]), KP)
        best = tl.topk(tl.reshape(tl.join(best, fresh), [BT, 2 * KP]), KP)

    cell = row * spans + span
    tl.store(max_ptr + cell, m, mask=row_mask)
    tl.store(sum_ptr + cell, total, mask=row_mask)
    tl.store(keys_ptr + cell[:, None] * KP + tl.arange(0, KP)[None, :], best, mask=row_mask[:, None])


@triton.jit(do_not_specialize=["spans"])
def merge_topk_kernel(
    keys_ptr,
    max_ptr,
    sum_ptr,
    values_ptr,
    ids_ptr,
    log_z_ptr,
    spans,
    SPANS_P: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0)
    span = tl.arange(0, SPANS_P)
    inside = span < spans
    m = tl.load(max_ptr + row * spans + span, mask=inside, other=float("-inf"))
    s = tl.load(sum_ptr + row * spans + span, mask=inside, other=0.0)
    top = tl.max(m, axis=0)
    tl.store(log_z_ptr + row, top + tl.log(tl.sum(s * tl.exp(m - top), axis=0)))

    at = tl.arange(0, CHUNK)
    best = tl.full([KP], -0x8000000000000000, tl.int64)
    for start in range(0, spans * KP, CHUNK):
        keys = tl.load(
            keys_ptr + row * spans * KP + start + at,
            mask=start + at < spans * KP,
            other=-0x8000000000000000,
        )
        best = tl.topk(tl.reshape(tl.join(best, tl.topk(keys, KP)), [2 * KP]), KP)
    value, col = _unpack(best)
    k = tl.arange(0, KP)
    tl.store(values_ptr + row * K + k, value, mask=k < K)
    tl.store(ids_ptr + row * K + k, col, mask=k < K)


def draft_topk_triton(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    k: int,
    *,
    logit_cap: float = 0.0,
    race: Race | None = None,
    vocab_start: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Top-K logits (perturbed in a race) float32 [T, K], row ids int64 [T, K], log-sum-exp float32 [T]."""
    T, H = hidden.shape
    V = head_weight.shape[0]
    device = hidden.device
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    KP = max(triton.next_power_of_2(k), 2)
    BT = min(max(triton.next_power_of_2(T), 16), 64)
    row_blocks, tiles = triton.cdiv(T, BT), triton.cdiv(V, BLOCK_V)
    tiles_per_span = triton.cdiv(tiles, max(min(tiles, sm_count(device) // row_blocks), 1))
    spans = triton.cdiv(tiles, tiles_per_span)
    keys = torch.empty(T, spans, KP, dtype=torch.int64, device=device)
    # Two tensors, not two rows of one: where the second began would depend on T.
    largest, total = (torch.empty(T, spans, dtype=torch.float32, device=device) for _ in range(2))
    # Without a race its pointers are never read: any tensor stands in.
    seeds, positions = (keys, keys) if race is None else (race.seeds.long(), race.positions.long())
    scale, strength = (largest, largest) if race is None else (race.scale.float(), race.strength.float())
    head_topk_kernel[(row_blocks, spans)](
        hidden, head_weight, keys, largest, total,
        seeds.contiguous(), positions.contiguous(), scale.contiguous(), strength.contiguous(),
        T, V, H, spans, tiles_per_span, vocab_start, float(logit_cap),
        hidden.stride(0), head_weight.stride(0),
        KP=KP, BT=BT, BV=BLOCK_V, BH=BLOCK_H, HAS_CAP=logit_cap > 0,
        HAS_RACE=race is not None,
        PRECISION="ieee" if hidden.dtype == torch.float32 else "tf32", UPCAST=interpreting(),
        num_warps=WARPS, num_stages=stages(KP),
    )  # fmt: skip
    values = torch.empty(T, k, dtype=torch.float32, device=device)
    ids = torch.empty(T, k, dtype=torch.int64, device=device)
    log_z = torch.empty(T, dtype=torch.float32, device=device)
    merge_topk_kernel[(T,)](
        keys, largest, total, values, ids, log_z, spans,
        SPANS_P=triton.next_power_of_2(sm_count(device)), K=k, KP=KP, CHUNK=_MERGE_CHUNK, num_warps=4,
    )  # fmt: skip
    return values, ids, log_z
