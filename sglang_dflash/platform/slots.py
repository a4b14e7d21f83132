"""KV slot bookkeeping in plain torch, for the places where SGLang launches Triton."""

from __future__ import annotations

import torch


def extend_cache_locs(
    *,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    batch_size: int,
    draft_token_num: int,
    device: torch.device | str,
) -> torch.Tensor:
    """Slots of ``draft_token_num`` positions from ``start_offset`` on, per request.

    Counterpart of ``assign_extend_cache_locs_func``; every request has the same width,
    so ``end_offset`` is not needed.

    Returns:
        int64 ``[batch_size * draft_token_num]``, request-major.
    """
    columns = start_offset.long()[:, None] + torch.arange(draft_token_num, device=start_offset.device)
    return req_to_token[req_pool_indices.long()[:, None], columns].reshape(-1).long()


def assign_req_to_token(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    batch_size: int,
) -> None:
    """Write newly allocated slots into the requests' rows, in place.

    Request ``i`` takes ``end_offset[i] - start_offset[i]`` slots of ``out_cache_loc``, in
    order, at columns ``start_offset[i] : end_offset[i]`` of row ``req_pool_indices[i]``.
    """
    lengths = (end_offset - start_offset).long()
    rows = torch.repeat_interleave(req_pool_indices.long(), lengths)
    first = torch.cumsum(lengths, 0) - lengths
    shift = torch.repeat_interleave(start_offset.long() - first, lengths)
    columns = torch.arange(rows.numel(), device=rows.device) + shift
    req_to_token[rows, columns] = out_cache_loc[: rows.numel()].to(req_to_token.dtype)
