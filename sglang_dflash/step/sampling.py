"""One token per row from the target's distribution, filtered as plain decoding filters it.

Sampling the target once at every node and following the child that carries the sampled token
emits exactly the target's samples, whatever the tree (SpecInfer's naive sampling, arXiv 2305.09781).
The sample is a seeded race (`dflash_kernels.race_argmax`): its noise depends on the request's seed,
the token's index in the sequence and the token id, so prefill, plain decoding and every tree node
take the same token. Prefill and plain decoding come here through ``upstream/sampler.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from dflash_kernels import race_argmax
from dflash_kernels.head_topk.reference import stable_topk

_LEADING = 256  # candidates looked at before a whole row is sorted (CPU)


@dataclass
class SamplingParams:
    """Per-request sampling parameters, on the device.

    Attributes:
        temperature: float32 [bs], > 0 (greedy requests have top_k 1).
        top_k: int [bs], 1 means greedy, values >= V mean off.
        top_p: float32 [bs], 1 means off.
        min_p: float32 [bs], 0 means off.
        all_greedy, any_top_k, any_top_p, any_min_p: what the batch needs at all (host booleans).
        seeds: int64 [bs], keys of the noise; None in a batch that is greedy throughout.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    all_greedy: bool
    any_top_k: bool
    any_top_p: bool
    any_min_p: bool
    seeds: torch.Tensor | None = None

    @property
    def any_filter(self) -> bool:
        return self.any_top_k or self.any_top_p or self.any_min_p

    def per_row(self, rows: int) -> SamplingParams:
        """The same parameters for every one of a request's ``rows`` rows."""

        def repeat(values: torch.Tensor) -> torch.Tensor:
            return values.reshape(-1).repeat_interleave(rows)

        return replace(
            self,
            temperature=repeat(self.temperature),
            top_k=repeat(self.top_k),
            top_p=repeat(self.top_p),
            min_p=repeat(self.min_p),
            seeds=None if self.seeds is None else repeat(self.seeds),
        )

    def of_rows(self, rows: torch.Tensor) -> SamplingParams:
        """The parameters of some rows, int64 [n]."""
        return replace(
            self,
            temperature=self.temperature[rows],
            top_k=self.top_k[rows],
            top_p=self.top_p[rows],
            min_p=self.min_p[rows],
            seeds=None if self.seeds is None else self.seeds[rows],
        )


def unfiltered(requests: int, vocab: int, device: torch.device) -> SamplingParams:
    """Requests at temperature 1 without a filter, all with seed 0."""
    ones = torch.ones(requests, device=device)
    return SamplingParams(
        temperature=ones,
        top_k=torch.full((requests,), vocab, device=device),
        top_p=ones,
        min_p=torch.zeros_like(ones),
        all_greedy=False,
        any_top_k=False,
        any_top_p=False,
        any_min_p=False,
        seeds=torch.zeros(requests, dtype=torch.int64, device=device),
    )


def filtered_probs(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The distribution each row is sampled from, float32 [rows, V], not renormalised after filters."""
    return filter_probs((logits.float() / params.temperature[:, None]).softmax(dim=-1), params)


def filter_probs(probs: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """``probs`` [rows, V] with everything outside top-k, top-p and min-p at 0.

    SGLang's order (``layers/sampler.py``, pytorch backend), on the sorted probabilities; equal ones in
    order of their ids. A row's result does not depend on the other rows.
    """
    if not params.any_filter:
        return probs
    vocab = probs.shape[1]
    off = (params.top_k >= vocab) & (params.top_p >= 1.0) & (params.min_p <= 0.0)
    if probs.is_cuda or vocab <= _LEADING:
        ranked, order = probs.sort(dim=-1, descending=True, stable=True)
        inside = torch.zeros_like(probs).scatter_(1, order, ranked * kept(ranked, params))
        return torch.where(off[:, None], probs, inside)
    # On a CPU a row of 49,152 costs 4 ms to sort: only rows whose cut is not among the largest pay it.
    filtered, rows = probs.clone(), (~off).nonzero()[:, 0]
    for leading in (_LEADING, vocab):
        if not len(rows):
            break
        ranked, order = stable_topk(probs[rows], leading)
        keep = kept(ranked, params.of_rows(rows))
        filtered[rows] = torch.zeros_like(filtered[rows]).scatter_(1, order, ranked * keep)
        rows = rows[keep[:, -1]]
    return filtered


def kept(ranked: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """bool [rows, K], which of the K largest probabilities stay; the kept ones are a prefix."""
    keep = torch.ones_like(ranked, dtype=torch.bool)
    if params.any_top_k:
        rank = torch.arange(ranked.shape[1], device=ranked.device)
        keep &= rank < params.top_k[:, None]
    if params.any_top_p:
        # Rounding carries a sum past 1, which must not cut the tail of a row without top-p.
        keep &= (ranked.cumsum(dim=-1) - ranked <= params.top_p[:, None]) | (params.top_p[:, None] >= 1.0)
    if params.any_min_p:
        keep &= ranked >= ranked[:, :1] * params.min_p[:, None]
    return keep


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """int64 [rows], the lowest id among equals, as plain decoding takes it.

    On CPU torch scans bfloat16 row by row without vector instructions: 5.7 ms for 32 rows of 49,152
    against 1.6 ms in float32.
    """
    return (logits if logits.is_cuda else logits.float()).argmax(dim=-1)


def sample_rows(probs: torch.Tensor, params: SamplingParams, positions: torch.Tensor) -> torch.Tensor:
    """int64 [rows]: the sample of each row of SGLang's probabilities, as a tree node would take it.

    Args:
        probs: float32 [rows, V], softmax of the logits over the temperature.
        positions: int64 [rows], index in the sequence of the token to sample.
    """
    assert params.seeds is not None
    chosen = race_argmax(filter_probs(probs, params), params.seeds, positions)
    return torch.where(params.top_k <= 1, probs.argmax(dim=-1), chosen) if params.any_top_k else chosen
