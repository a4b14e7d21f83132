"""The target's own choice at every node of a tree."""

from __future__ import annotations

import torch
from dflash_kernels import race_argmax

from sglang_dflash.step.noise import StepNoise
from sglang_dflash.step.sampling import SamplingParams, argmax, filtered_probs


def sample_nodes(
    logits: torch.Tensor, params: SamplingParams, noise: StepNoise, depth: torch.Tensor
) -> torch.Tensor:
    """int64 [bs * N]: argmax where top_k is 1, else one exact sample.

    Args:
        logits: [bs * N, V].
        params: per request; nodes of one depth share their noise.
        depth: int [bs, N].
    """
    params = params.per_row(depth.shape[1])
    probs = filtered_probs(logits, params)
    groups = noise.groups(depth)
    sampled = race_argmax(
        probs,
        noise.seeds,
        noise.positions,
        groups=groups,
        noise=noise.table(logits.shape[1], groups),
    )
    return torch.where(params.top_k <= 1, argmax(logits), sampled) if params.any_top_k else sampled
