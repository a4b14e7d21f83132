"""The seeded race in one pass over the probabilities: the noise never reaches memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dflash_kernels.gumbel.reference import KEY_SALTS, LARGEST_UNIFORM, MULTIPLIERS, UNIFORM_SCALE

BLOCK = 1024
WARPS = 4
_SPAN = 8 * BLOCK

M0 = tl.constexpr(MULTIPLIERS[0])
M1 = tl.constexpr(MULTIPLIERS[1])
M2 = tl.constexpr(MULTIPLIERS[2])
SALT0 = tl.constexpr(KEY_SALTS[0])
SALT1 = tl.constexpr(KEY_SALTS[1])
SCALE = tl.constexpr(UNIFORM_SCALE)
LARGEST = tl.constexpr(LARGEST_UNIFORM)


@triton.jit
def _xorshift(x, BITS: tl.constexpr):
    return x ^ ((x >> BITS) & ((1 << (32 - BITS)) - 1))


@triton.jit
def _mix(x):
    x = _xorshift(x, 16) * M0
    x = _xorshift(x, 15) * M1
    return _xorshift(x, 16)


@triton.jit
def exponential(seed, position, col):
    """E of one row's columns; see reference.py."""
    low, high, place = seed.to(tl.int32), (seed >> 32).to(tl.int32), position.to(tl.int32)
    first = _mix(_mix(_mix(low ^ SALT0) ^ high) ^ place)
    second = _mix(_mix(_mix(high ^ SALT1) ^ low) + place)
    x = (_mix(col ^ first) + second) * M2
    x = _xorshift(x, 15) * M0
    x = (_xorshift(x, 16) >> 1) & 0x7FFFFFFF
    u = tl.minimum((x.to(tl.float32) + 0.5) * SCALE, LARGEST)
    # -log1p(-u): the winner's noise is small, where 1 - u would have lost its bits.
    tail = 0.2 + u * (0.16666667 + u * 0.14285715)
    series = u * (1.0 + u * (0.5 + u * (0.33333334 + u * (0.25 + u * tail))))
    return tl.where(u < 0.0625, series, -tl.log(1.0 - u))


@triton.jit
def race_noise_kernel(
    seeds_ptr, positions_ptr, ids_ptr, out_ptr, V, HAS_IDS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(ids_ptr + row * V + col, mask=col < V, other=0).to(tl.int32) if HAS_IDS else col
    noise = exponential(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), token)
    tl.store(out_ptr + row * V + col, noise, mask=col < V)


@triton.jit
def race_argmax_kernel(
    probs_ptr,
    seeds_ptr,
    positions_ptr,
    groups_ptr,
    keys_ptr,
    V,
    SPAN,
    stride_r,
    HAS_GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    group = tl.load(groups_ptr + row) if HAS_GROUPS else row
    seed = tl.load(seeds_ptr + group)
    position = tl.load(positions_ptr + group)
    at = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], -1, tl.int64)
    first = tl.program_id(1) * SPAN
    for start in range(first, tl.minimum(first + SPAN, V), BLOCK):
        col = start + at
        p = tl.load(probs_ptr + row.to(tl.int64) * stride_r + col, mask=col < V, other=0.0)
        score = p / exponential(seed, position, col)
        # Scores are >= 0, so their bits order as integers do; equal scores: the lower id.
        bits = score.to(tl.int32, bitcast=True).to(tl.int64)
        key = (bits << 32) | (0xFFFFFFFF - col.to(tl.int64))
        best = tl.maximum(best, tl.where(col < V, key, -1))
    tl.store(keys_ptr + row * tl.num_programs(1) + tl.program_id(1), tl.max(best, axis=0))


def race_noise_triton(
    seeds: torch.Tensor, positions: torch.Tensor, vocab: int, ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Same contract as `dflash_kernels.race_noise`; with ids [G, vocab] as `race_noise_at`."""
    out = torch.empty((seeds.shape[0], vocab), dtype=torch.float32, device=seeds.device)
    seeds, positions = seeds.long().contiguous(), positions.long().contiguous()
    race_noise_kernel[(seeds.shape[0], triton.cdiv(vocab, BLOCK))](
        seeds,
        positions,
        seeds if ids is None else ids.long().contiguous(),
        out,
        vocab,
        HAS_IDS=ids is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return out


def race_argmax_triton(
    probs: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, groups: torch.Tensor | None = None
) -> torch.Tensor:
    """Same contract as `dflash_kernels.race_argmax`."""
    rows, vocab = probs.shape
    probs = probs.float()
    probs = probs if probs.stride(1) == 1 else probs.contiguous()
    seeds, positions = seeds.long().contiguous(), positions.long().contiguous()
    spans = triton.cdiv(vocab, _SPAN)
    keys = torch.empty((rows, spans), dtype=torch.int64, device=probs.device)
    race_argmax_kernel[(rows, spans)](
        probs,
        seeds,
        positions,
        seeds if groups is None else groups.long().contiguous(),
        keys,
        vocab,
        _SPAN,
        probs.stride(0),
        HAS_GROUPS=groups is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return 0xFFFFFFFF - (keys.amax(1) & 0xFFFFFFFF)
