"""Rank the drafter's candidates by the chance that the target's sample will be them.

The target samples ``argmax_v log p_v + g_v`` with noise g that is known before it runs
(`dflash_kernels.race_argmax`); only p is not. If the drafter's q were p, its perturbed scores would name
the sample. It is off by an error, so the chance of token v is taken as a mixture: mostly a softmax of
``SHARPNESS * (log q_v + g_v)``, for the rest q_v as if the noise were unknown. The tree is only a bet:
what is emitted is the target's own sample whatever the scores. Both constants are fitted, see
docs/sampling.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from dflash_kernels import Race

from sglang_dflash.step.noise import StepNoise
from sglang_dflash.step.sampling import SamplingParams, kept

SHARPNESS = 0.7
UNCOUPLED = 0.25
POOL = 32  # candidates taken from the head before they are ranked by their chance


def race_for(noise: StepNoise, params: SamplingParams, depth: int, vocab: int) -> Race:
    """How the head ranks the draft positions' rows [bs * L].

    Rows without a filter take their candidates by perturbed score from the whole vocabulary. A filter
    asks for the most probable tokens, so there, and for greedy requests, the logits decide.
    """
    unfiltered = (params.top_k >= vocab) & (params.top_p >= 1.0) & (params.min_p <= 0.0)
    rows = noise.groups(torch.arange(depth, device=noise.seeds.device).expand(len(params.top_k), -1))
    table = noise.table(vocab, rows)
    return Race(
        seeds=noise.seeds[rows],
        positions=noise.positions[rows],
        scale=(1.0 / params.temperature).repeat_interleave(depth),
        strength=unfiltered.float().repeat_interleave(depth),
        noise=None if table is None else table[rows],
    )


@dataclass
class Coupled:
    """Candidates of rows, the likeliest to be the sample first.

    Attributes:
        chances: float32 [rows, K], log; greedy rows keep the drafter's own log-probabilities.
        ids: int64 [rows, K].
        log_q: float32 [rows, K], tempered and filtered log-probabilities.
        gumbel: float32 [rows, K], the noise.
    """

    chances: torch.Tensor
    ids: torch.Tensor
    log_q: torch.Tensor
    gumbel: torch.Tensor


def mixture(log_q: torch.Tensor, gumbel: torch.Tensor) -> torch.Tensor:
    """Log of each candidate's (last dimension) chance to be the sample."""
    coupled = (SHARPNESS * (log_q + gumbel)).log_softmax(dim=-1)
    return torch.logaddexp(coupled + math.log1p(-UNCOUPLED), log_q + math.log(UNCOUPLED))


def couple(values: torch.Tensor, ids: torch.Tensor, race: Race, params: SamplingParams, top: int) -> Coupled:
    """Chances of the best ``top`` candidates of each row.

    Args:
        values: float32 [rows, P], tempered log-probabilities plus each row's share of the noise
            (`dflash_kernels.draft_topk` with a race).
        ids: int64 [rows, P].
        params: per row.

    """
    gumbel = race.gumbel(ids)
    log_q = values - race.strength[:, None] * gumbel
    if params.any_filter:
        # Filtered rows came by probability, which is the order the filters need.
        inside = kept(log_q.exp(), params) | (race.strength[:, None] > 0)
        log_q = log_q.masked_fill(~inside, float("-inf"))
        total = log_q.logsumexp(dim=1, keepdim=True)
        log_q = torch.where(race.strength[:, None] > 0, log_q, log_q - total)
    greedy = (params.top_k <= 1)[:, None]
    chance = torch.where(greedy, values, mixture(log_q, gumbel))
    chance, order = chance.sort(dim=1, descending=True, stable=True)
    order = order[:, :top]
    return Coupled(
        chance[:, :top].contiguous(), ids.gather(1, order), log_q.gather(1, order), gumbel.gather(1, order)
    )
