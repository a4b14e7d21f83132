"""Recall in two launches: programs scan spans of the texts, then one per request takes the best.

A match is one number, its length above its position, so that the best of a span and the best of all spans
are maxima.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dflash_kernels.recall import Recalled

SPAN = 2048
BLOCK = 512
WARPS = 4


@triton.jit
def scan_kernel(
    history_ptr,
    rows_ptr,
    lengths_ptr,
    best_ptr,
    stride_history,
    SPANS: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    MIN_MATCH: tl.constexpr,
    MAX_MATCH: tl.constexpr,
):
    """best[b, span] = length << 32 | position of the best match that ends in the span; 0 for none."""
    b = tl.program_id(0)
    span = tl.program_id(1)
    text = history_ptr + tl.load(rows_ptr + b).to(tl.int64) * stride_history
    last = tl.load(lengths_ptr + b).to(tl.int32) - 1
    offset = tl.arange(0, BLOCK)
    best = tl.zeros([BLOCK], dtype=tl.int64)
    # Positions before `last` alone: a span behind the text's end costs two loads.
    for start in range(span * SPAN, tl.minimum((span + 1) * SPAN, last), BLOCK):
        at = start + offset
        alive = at < last
        length = tl.zeros([BLOCK], dtype=tl.int32)
        j = start * 0
        going = j == 0
        while going:
            token = tl.load(text + last - j, mask=j <= last, other=-1)  # no token is -1
            alive = alive & (tl.load(text + at - j, mask=alive & (at >= j), other=-2) == token)
            length += alive.to(tl.int32)
            j += 1
            going = (tl.max(alive.to(tl.int32), axis=0) > 0) & (j < MAX_MATCH)
        key = (length.to(tl.int64) << 32) | at.to(tl.int64)
        best = tl.maximum(best, tl.where(length >= MIN_MATCH, key, 0))
    tl.store(best_ptr + b * SPANS + span, tl.max(best, axis=0))


@triton.jit(do_not_specialize=["D"])
def continue_kernel(
    history_ptr,
    rows_ptr,
    lengths_ptr,
    best_ptr,
    matched_ptr,
    ids_ptr,
    stride_history,
    D,
    SPANS: tl.constexpr,
    DP: tl.constexpr,
):
    """The best of all spans and what followed it."""
    b = tl.program_id(0)
    text = history_ptr + tl.load(rows_ptr + b).to(tl.int64) * stride_history
    last = tl.load(lengths_ptr + b).to(tl.int32) - 1
    best = tl.max(tl.load(best_ptr + b * SPANS + tl.arange(0, SPANS)), axis=0)
    matched = (best >> 32).to(tl.int32)
    at = (best & 0xFFFFFFFF).to(tl.int32)
    tl.store(matched_ptr + b, matched)
    d = tl.arange(0, DP)
    period = tl.maximum(last - at, 1)
    token = tl.load(text + at + 1 + d % period, mask=(d < D) & (matched > 0), other=0)
    tl.store(ids_ptr + b * D + d, token.to(tl.int64), mask=d < D)


def recall_triton(
    history: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    *,
    count: int,
    longest: int,
    min_match: int,
    max_match: int,
) -> Recalled:
    """Same contract as `dflash_kernels.recall`; the grid depends on static numbers alone."""
    bs, dev = rows.shape[0], history.device
    history = history if history.stride(1) == 1 else history.contiguous()
    # A power of two, lest a growing text compiles a kernel every few thousand tokens.
    spans = triton.next_power_of_2(max(triton.cdiv(longest, SPAN), 1))
    best = torch.empty((bs, spans), dtype=torch.int64, device=dev)
    found = Recalled(
        torch.empty(bs, dtype=torch.int32, device=dev),
        torch.empty((bs, count), dtype=torch.int64, device=dev),
    )
    scan_kernel[(bs, spans)](
        history,
        rows,
        lengths,
        best,
        history.stride(0),
        SPANS=spans,
        SPAN=SPAN,
        BLOCK=BLOCK,
        MIN_MATCH=min_match,
        MAX_MATCH=max_match,
        num_warps=WARPS,
    )
    continue_kernel[(bs,)](
        history,
        rows,
        lengths,
        best,
        *found,
        history.stride(0),
        count,
        SPANS=spans,
        DP=max(triton.next_power_of_2(count), 32),
        num_warps=1,
    )
    return found
