"""Torch twin of KV compaction; the product path on CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def compact_kv_torch(
    caches: Sequence[torch.Tensor], slots: torch.Tensor, path: torch.Tensor, accept_lens: torch.Tensor
) -> None:
    """Same contract as `dflash_kernels.KVCompactor.__call__`; `caches` is its list."""
    D = min(path.shape[1], slots.shape[1])
    path = path[:, :D].long()
    depth = torch.arange(D, device=path.device)
    moved = (depth < accept_lens[:, None]) & (path != depth)
    # Reading sizes on the host is free on CPU, and most steps accept the spine: nothing moves.
    if not moved.any():
        return
    src = slots.gather(1, path.clamp(min=0))[moved].long()
    dst = slots[:, :D][moved].long()
    for cache in caches:
        rows = cache.view(torch.uint8) if cache.element_size() == 1 else cache
        rows[dst] = rows[src]  # all sources are read before the first write
