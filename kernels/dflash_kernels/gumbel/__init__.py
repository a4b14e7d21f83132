"""Sampling by a race of exponentials whose noise is a hash of (seed, position, token id).

``argmax_v p_v / E_v`` with independent E_v ~ Exp(1) is an exact sample of p; with g = -log E this is the
Gumbel-max trick, ``argmax_v log p_v + g_v``. The noise of a token depends on three integers only, not on
its rank, its batch or its row, so the sample at a position is known to be the same wherever it is taken,
and the noise of future positions is known before their logits.
"""

from __future__ import annotations

import torch

from dflash_kernels._dispatch import use_triton


def race_noise(seeds: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """Exponential noise, one row per (seed, position).

    A 32-bit integer hash gives the bits (equal on every device), 31 of them a uniform strictly inside (0, 1):
    the smallest value is 2.3e-10, so tokens rarer than that lose.

    Args:
        seeds: int64 [G]. positions: int64 [G], below 2^32.
        vocab: V, columns are token ids 0..V-1.

    Returns:
        float32 [G, V], E ~ Exp(1), finite and > 0. ``-log(E)`` is the Gumbel noise.
    """
    if use_triton(seeds):
        from dflash_kernels.gumbel.kernel import race_noise_triton as impl
    else:
        from dflash_kernels.gumbel.reference import race_noise_torch as impl
    return impl(seeds, positions, vocab)


def race_argmax(
    probs: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    *,
    groups: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """One exact sample of each row; equal scores go to the lower id.

    Args:
        probs: float32 [R, V], >= 0, not necessarily normalised; 0 is never chosen.
        seeds: int64 [G]. positions: int64 [G]; row r's noise is that of (seeds, positions)[groups[r]].
        groups: int64 [R], or None where R = G and row r is group r.
        noise: `race_noise(seeds, positions, V)` where the caller has it already; the Triton path hashes in
            registers and does not read it.

    Returns:
        int64 [R].
    """
    if use_triton(probs):
        from dflash_kernels.gumbel.kernel import race_argmax_triton

        return race_argmax_triton(probs, seeds, positions, groups)
    from dflash_kernels.gumbel.reference import race_argmax_torch

    return race_argmax_torch(probs, seeds, positions, groups, noise)
