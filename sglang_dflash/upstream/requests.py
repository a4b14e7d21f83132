"""What requests ask for, read from SGLang's request objects."""

from __future__ import annotations

from typing import Any

import torch

from sglang_dflash.step.penalties import Penalties
from sglang_dflash.step.trace import ASKED


def needs_penalties(info: Any) -> bool:
    """Whether any request of the batch has a penalty or min_new_tokens, without looking at each.

    Under overlap the batch's sampling info carries upstream's (lagging) penalty tensors in place of
    the orchestrator; their presence is the mark.
    """
    orchestrator = info.penalizer_orchestrator
    return info.acc_additive_penalties is not None or (orchestrator is not None and orchestrator.is_required)


def sampled_rows(batch: Any) -> list[bool]:
    """Per request, whether it draws its tokens; a greedy one has top_k 1."""
    info = batch.sampling_info
    if info is None or info.is_all_greedy:
        return [False] * len(batch.reqs)
    return [req.sampling_params.top_k > 1 for req in batch.reqs]


def traced_rows(batch: Any) -> list[bool] | None:
    """Per request, whether it asks what its steps did; None where none does."""
    rows = [bool((req.sampling_params.custom_params or {}).get(ASKED)) for req in batch.reqs]
    return rows if any(rows) else None


def sampled_share(batch: Any) -> float:
    """The share of the batch's requests that draw their tokens."""
    rows = sampled_rows(batch)
    return sum(rows) / max(1, len(rows))


def penalties_of(batch: Any, device: torch.device) -> Penalties:
    """The batch's penalty parameters. Only penalised batches pay for this loop."""
    params = [req.sampling_params for req in batch.reqs]
    stops = [_stop_ids(req) for req in batch.reqs]
    widest = max(1, max(map(len, stops)))

    def column(values: list, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

    return Penalties(
        frequency=column([p.frequency_penalty for p in params], torch.float32),
        presence=column([p.presence_penalty for p in params], torch.float32),
        repetition=column([p.repetition_penalty for p in params], torch.float32),
        min_new_tokens=column([p.min_new_tokens for p in params], torch.int64),
        stop_ids=column([ids + [-1] * (widest - len(ids)) for ids in stops], torch.int64),
        prompt_lens=column([len(req.origin_input_ids) for req in batch.reqs], torch.int64),
    )


def _stop_ids(req: Any) -> list[int]:
    """Every token that ends the request, as ``penaltylib/min_new_tokens.py`` collects them."""
    if req.sampling_params.min_new_tokens <= 0:
        return []
    ids = set(req.sampling_params.stop_token_ids or ()) | set(req.eos_token_ids or ())
    if req.tokenizer is not None:
        ids |= set(req.tokenizer.additional_stop_token_ids or ())
        ids.add(req.tokenizer.eos_token_id)
    return sorted(token for token in ids if token is not None)
