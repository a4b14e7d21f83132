"""Torch twin of the draft top-K; the product path on CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from dflash_kernels.gumbel import Race

Project = Callable[[torch.Tensor], torch.Tensor]

_BLOCK = 64
_CHUNK_ROWS = 128


def draft_topk_torch(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    k: int,
    *,
    logit_cap: float = 0.0,
    project: Project | None = None,
    race: Race | None = None,
    vocab_start: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Top-K logits (perturbed in a race) float32 [T, K], row ids int64 [T, K], log-sum-exp float32 [T]."""
    parts = []
    for at in range(0, hidden.shape[0], _CHUNK_ROWS):
        rows = slice(at, at + _CHUNK_ROWS)
        some = None if race is None else _rows_of(race, rows, vocab_start, head_weight.shape[0])
        parts.append(_chunk(hidden[rows], head_weight, k, logit_cap, project, some))
    if len(parts) == 1:
        return parts[0]
    values, ids, log_z = (torch.cat(p) for p in zip(*parts, strict=True))
    return values, ids, log_z


def _rows_of(race: Race, rows: slice, start: int, count: int) -> Race:
    """Some rows of a race, its noise cut to the tokens start .. start + count - 1."""
    assert race.noise is not None
    return replace(
        race,
        scale=race.scale[rows],
        strength=race.strength[rows],
        noise=race.noise[rows, start : start + count],
    )


def _chunk(
    hidden: torch.Tensor,
    head: torch.Tensor,
    k: int,
    logit_cap: float,
    project: Project | None,
    race: Race | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shift = None
    if race is not None and race.noise is not None:
        shift = -race.strength[:, None] * race.noise.log()

    def scaled(logits: torch.Tensor) -> torch.Tensor:
        if logit_cap > 0:
            logits = logit_cap * torch.tanh(logits / logit_cap)
        return logits if race is None else logits * race.scale[:, None]

    logits = (hidden @ head.t()).float() if project is None else project(hidden)[:, : head.shape[0]].float()
    if hidden.dtype == torch.float32:
        logits = scaled(logits)
        values, ids = stable_topk(logits if shift is None else logits + shift, k)
        return values, ids, _log_z(logits, ids)
    # A bf16 matmul rounds logits near 20 to steps of 1/8, which would blur the tree's scores. Pick twice as
    # many candidates as needed from the rounded logits and recompute those few in float32. A single candidate
    # is not ranked: there the rounded logits decide, as in an engine's own greedy draft head.
    rough = logits if shift is None else scaled(logits) + shift
    _, picks = stable_topk(rough, 1 if k == 1 else min(2 * k, head.shape[0]))
    picks = picks.sort(dim=1).values
    exact = (head[picks].float() * hidden.float()[:, None]).sum(2)
    logits = scaled(logits.scatter_(1, picks, exact))
    exact = logits.gather(1, picks)
    values, order = (exact if shift is None else exact + shift.gather(1, picks)).sort(
        dim=1, descending=True, stable=True
    )
    values, ids = values[:, :k].contiguous(), picks.gather(1, order[:, :k])
    return values, ids, _log_z(logits, ids)


def _log_z(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp of each row through log_softmax, whose CPU kernel is fused where logsumexp's is not."""
    first = ids[:, :1]
    return (logits.gather(1, first) - logits.log_softmax(1).gather(1, first))[:, 0]


def stable_topk(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-K of each row of [T, V], equal values ordered by index; both outputs [T, k].

    torch.topk leaves ties open and scans the whole row with a partial sort. The K best elements lie in the
    K blocks with the best maxima, so a vectorised block maximum leaves only K * 64 elements to sort.
    """
    T, V = values.shape
    if 2 * k * _BLOCK >= V:
        best, index = values.sort(dim=1, descending=True, stable=True)
        return best[:, :k], index[:, :k]
    pad = -V % _BLOCK
    if pad:
        values = torch.nn.functional.pad(values, (0, pad), value=float("-inf"))
    blocks = values.view(T, -1, _BLOCK)
    _, block = _keyed_topk(blocks.amax(2), k)
    block = block.sort(dim=1).values
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).view(T, -1)
    best, at = _keyed_topk(inside, k)
    # A negative NaN ranks below the padding's -inf: ids stay below V even then.
    return best, (block.gather(1, at // _BLOCK) * _BLOCK + at % _BLOCK).clamp_(max=V - 1)


def _keyed_topk(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact top-K with ties by index, through one integer key per element."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    index = torch.arange(values.shape[1], device=values.device)
    key = (ordered.long() << 32) - index
    index = key.topk(k, dim=1).indices
    return values.gather(1, index), index
