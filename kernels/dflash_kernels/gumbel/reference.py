"""Torch twin of the seeded race; the product path on CPU.

int32 arithmetic wraps as the kernel's does, and twice as many lanes of it fit a vector as of int64.
"""

from __future__ import annotations

import torch

# Odd multipliers and shifts of "lowbias32" and "triple32" (Chris Wellons, hash-prospector, public domain).
MULTIPLIERS = (0x7FEB352D, -0x7B935975, 0x31848BAB)  # the second is 0x846CA68B as int32
KEY_SALTS = (0x243F6A88, -0x7A5CF72D)  # digits of pi, 0x243F6A88 and 0x85A308D3
UNIFORM_SCALE = 2.0**-31
LARGEST_UNIFORM = 1.0 - 2.0**-24
_CACHED = 1 << 16  # elements


def _xorshift_(x: torch.Tensor, bits: int, scratch: torch.Tensor) -> torch.Tensor:
    """x ^= x >> bits with the logical shift of unsigned numbers, in place."""
    torch.bitwise_right_shift(x, bits, out=scratch)
    scratch &= (1 << (32 - bits)) - 1
    x ^= scratch
    return x


def _mix_(x: torch.Tensor, scratch: torch.Tensor | None = None) -> torch.Tensor:
    """In-place bijection of int32 in which each input bit flips each output bit half the time."""
    scratch = torch.empty_like(x) if scratch is None else scratch
    _xorshift_(x, 16, scratch)
    x *= MULTIPLIERS[0]
    _xorshift_(x, 15, scratch)
    x *= MULTIPLIERS[1]
    return _xorshift_(x, 16, scratch)


def _low(x: torch.Tensor) -> torch.Tensor:
    """The low 32 bits of int64, as int32."""
    x = x & 0xFFFFFFFF
    return (x - ((x >> 31) << 32)).to(torch.int32)


def row_keys(seeds: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two int32 [G] keys of each (64-bit seed, position)."""
    low, high, position = _low(seeds.long()), _low(seeds.long() >> 32), _low(positions.long())
    first = _mix_(_mix_(_mix_(low ^ KEY_SALTS[0]) ^ high) ^ position)
    second = _mix_(_mix_(_mix_(high ^ KEY_SALTS[1]) ^ low) + position)
    return first, second


def race_bits(seeds: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """31 hash bits per token, int32 [G, V] >= 0."""
    bits = torch.empty((seeds.shape[0], vocab), dtype=torch.int32, device=seeds.device)
    ids = torch.arange(vocab, dtype=torch.int32, device=seeds.device)
    first, second = row_keys(seeds, positions)
    # A few rows at a time, so that the thirty passes over them stay in the processor's cache.
    rows = max(_CACHED // vocab, 1)
    for start in range(0, bits.shape[0], rows):
        part = slice(start, start + rows)
        x = torch.bitwise_xor(ids, first[part, None], out=bits[part])
        scratch = torch.empty_like(x)
        _mix_(x, scratch)
        # One 32-bit key would make two rows permutations of each other; the second enters in between.
        x += second[part, None]
        x *= MULTIPLIERS[2]
        _xorshift_(x, 15, scratch)
        x *= MULTIPLIERS[0]
        _xorshift_(x, 16, scratch)
        x >>= 1
        x &= 0x7FFFFFFF
    return bits


def race_noise_torch(seeds: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """Same contract as `dflash_kernels.race_noise`."""
    uniform = race_bits(seeds, positions, vocab).to(torch.float32)
    uniform.add_(0.5).mul_(UNIFORM_SCALE).clamp_(max=LARGEST_UNIFORM)
    return uniform.neg_().log1p_().neg_()


def race_argmax_torch(
    probs: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    groups: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """Same contract as `dflash_kernels.race_argmax`."""
    if noise is None:
        noise = race_noise_torch(seeds, positions, probs.shape[1])
    if groups is not None:
        noise = noise.index_select(0, groups)
    return (probs / noise).argmax(dim=1)
