"""The sampling noise of one step: one row per request and depth, known before the target runs."""

from __future__ import annotations

import torch
from dflash_kernels import race_noise

from sglang_dflash.step.sampling import SamplingParams


class StepNoise:
    """Noise keys of the tokens that a step can sample: depth 0 is the root's choice.

    A node at depth d stands at position prefix + d, and the token sampled there has index
    prefix + d + 1 in the sequence (prompt tokens plus generated ones before it).

    Args:
        seeds: int64 [bs], each request's.
        prefix_lens: int64 [bs], the root's position.
        depths: B, depths 0..B-1.

    Attributes:
        seeds, positions: int64 [bs * B], row b * B + d.
    """

    def __init__(self, seeds: torch.Tensor, prefix_lens: torch.Tensor, depths: int) -> None:
        self.depths = depths
        self.seeds = seeds.repeat_interleave(depths)
        steps = torch.arange(1, depths + 1, device=prefix_lens.device)
        self.positions = (prefix_lens[:, None] + steps).reshape(-1)
        self._table: torch.Tensor | None = None
        self._there = torch.zeros(0, dtype=torch.bool)

    @classmethod
    def of(cls, sampling: SamplingParams | None, prefix_lens: torch.Tensor, depths: int) -> StepNoise | None:
        """The step's noise, or None where every request is greedy and nothing must be computed."""
        if sampling is None or sampling.all_greedy:
            return None
        if sampling.seeds is None:
            raise RuntimeError("a sampled batch without seeds: the hooks of upstream/sampler.py are not in")
        return cls(sampling.seeds, prefix_lens, depths)

    def groups(self, depth: torch.Tensor) -> torch.Tensor:
        """int64 [bs * N], the noise row of each node of ``depth`` int [bs, N]."""
        first = torch.arange(depth.shape[0], device=depth.device) * self.depths
        return (first[:, None] + depth).reshape(-1)

    def table(self, vocab: int, rows: torch.Tensor) -> torch.Tensor | None:
        """Exponential noise float32 [bs * B, V], of which those rows are there that ``rows`` names (int64,
        any shape, some maybe twice); None on CUDA, where kernels hash it.

        A row is computed once, when it is first asked for: with recall a path may go down to the tree's
        last node, and most steps' trees are not that deep.
        """
        if self.seeds.is_cuda:
            return None
        if self._table is None or self._table.shape[1] < vocab:
            self._table = torch.empty((len(self.seeds), vocab))
            self._there = torch.zeros(len(self.seeds), dtype=torch.bool)
        missing = rows.flatten().unique()
        missing = missing[~self._there[missing]]
        if len(missing):
            self._table[missing] = race_noise(
                self.seeds[missing], self.positions[missing], self._table.shape[1]
            )
            self._there[missing] = True
        return self._table[:, :vocab]
