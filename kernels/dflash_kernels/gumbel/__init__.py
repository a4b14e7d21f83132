"""Sampling by a race of exponentials whose noise is a hash of (seed, position, token id).

``argmax_v p_v / E_v`` with independent E_v ~ Exp(1) is an exact sample of p; with g = -log E this is the
Gumbel-max trick, ``argmax_v log p_v + g_v``. The noise of a token depends on three integers only, not on
its rank, its batch or its row, so the sample at a position is known to be the same wherever it is taken,
and the noise of future positions is known before their logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dflash_kernels._dispatch import use_triton


@dataclass
class Race:
    """How `draft_topk` ranks rows: by ``scale * logit + strength * g`` with the Gumbel noise g of each token.

    Attributes:
        seeds, positions: int64 [T], the noise row of each row.
        scale: float32 [T], one over the temperature.
        strength: float32 [T], 1 to perturb a row, 0 to rank it by its logits.
        noise: float32 [T, V], `race_noise(seeds, positions, V)`, for the torch path.
    """

    seeds: torch.Tensor
    positions: torch.Tensor
    scale: torch.Tensor
    strength: torch.Tensor
    noise: torch.Tensor | None = None

    def gumbel(self, ids: torch.Tensor) -> torch.Tensor:
        """g of the tokens ``ids`` int64 [T, K], float32 [T, K], whatever the strength."""
        if self.noise is not None:
            return -self.noise.gather(1, ids).log()
        return -race_noise_at(self.seeds, self.positions, ids).log()


def race_noise_at(seeds: torch.Tensor, positions: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The noise of some tokens: float32 [G, K] for ids int64 [G, K]; see `race_noise`."""
    if use_triton(seeds):
        from dflash_kernels.gumbel.kernel import race_noise_triton

        return race_noise_triton(seeds, positions, ids.shape[1], ids)
    from dflash_kernels.gumbel.reference import race_noise_torch

    return race_noise_torch(seeds, positions, int(ids.max()) + 1).gather(1, ids)


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
        from dflash_kernels.gumbel.kernel import race_noise_triton

        return race_noise_triton(seeds, positions, vocab)
    from dflash_kernels.gumbel.reference import race_noise_torch

    return race_noise_torch(seeds, positions, vocab)


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
