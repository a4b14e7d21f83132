"""Torch twin of the draft top-K; the product path on CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Raw top-K logits float32 [T, K], row ids int64 [T, K], log-sum-exp float32 [T]."""
    parts = [_chunk(h, head_weight, k, logit_cap, project) for h in hidden.split(_CHUNK_ROWS)]
    if len(parts) == 1:
        return parts[0]
    values, ids, log_z = (torch.cat(p) for p in zip(*parts, strict=True))
    return values, ids, log_z


def _chunk(
    hidden: torch.Tensor, head: torch.Tensor, k: int, logit_cap: float, project: Project | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = (hidden @ head.t()).float() if project is None else project(hidden)[:, : head.shape[0]].float()
    if hidden.dtype == torch.float32:
        if logit_cap > 0:
            logits = logit_cap * torch.tanh(logits / logit_cap)
        values, ids = stable_topk(logits, k)
        return values, ids, _log_z(logits, values, ids)
    # A bf16 matmul rounds logits near 20 to steps of 1/8, which would blur the tree's scores. Pick twice as
    # many candidates as needed from the rounded logits and recompute those few in float32. A single candidate
    # is not ranked: there the rounded logits decide, as in an engine's own greedy draft head.
    _, picks = stable_topk(logits, 1 if k == 1 else min(2 * k, head.shape[0]))
    picks = picks.sort(dim=1).values
    exact = (head[picks].float() * hidden.float()[:, None]).sum(2)
    logits.scatter_(1, picks, exact)
    if logit_cap > 0:
        exact = logit_cap * torch.tanh(exact / logit_cap)
        logits = logit_cap * torch.tanh(logits / logit_cap)
    values, order = exact.sort(dim=1, descending=True, stable=True)
    values, ids = values[:, :k].contiguous(), picks.gather(1, order[:, :k])
    return values, ids, _log_z(logits, values, ids)


def _log_z(logits: torch.Tensor, values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp of each row through log_softmax, whose CPU kernel is fused where logsumexp's is not."""
    return values[:, 0] - logits.log_softmax(1).gather(1, ids[:, :1])[:, 0]


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
