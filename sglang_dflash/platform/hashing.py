"""Counter-based noise for seeded sampling, in plain torch."""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF


def _rotl(x: torch.Tensor, r: int) -> torch.Tensor:
    return ((x << r) | (x >> (32 - r))) & _MASK


def _mul(x: torch.Tensor, c: int) -> torch.Tensor:
    # Two 16-bit halves: a 32 x 32 bit product overflows int64's sign bit.
    return ((x * (c & 0xFFFF)) + (((x * (c >> 16)) & 0xFFFF) << 16)) & _MASK


def _mix(h: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    k = _mul(_rotl(_mul(k, 0xCC9E2D51), 15), 0x1B873593)
    return (_rotl(h ^ k, 13) * 5 + 0xE6546B64) & _MASK


def murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 of (64-bit seed, 32-bit position, 32-bit column), as SGLang's kernel hashes.

    Args:
        seed: integer ``[n]``. positions: integer ``[n]``. col_indices: integer ``[m]``.

    Returns:
        uint32 ``[n, m]``. SGLang's own CPU path needs ``sgl_kernel``
        (``sglang/kernels/ops/sampling/murmur_hash.py``).
    """
    seed = seed.to(torch.int64)
    h = _mix(torch.zeros_like(seed), seed & _MASK)
    h = _mix(h, (seed >> 32) & _MASK)
    h = _mix(h, positions.to(torch.int64) & _MASK)
    h = _mix(h[:, None], (col_indices.to(torch.int64) & _MASK)[None, :])
    h = h ^ 16
    h = _mul(h ^ (h >> 16), 0x85EBCA6B)
    h = _mul(h ^ (h >> 13), 0xC2B2AE35)
    return (h ^ (h >> 16)).to(torch.uint32)
