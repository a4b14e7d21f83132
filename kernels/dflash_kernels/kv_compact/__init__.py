"""Moves the KV rows of an accepted path to the front of a request's draft slots."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dflash_kernels._dispatch import use_triton


class KVCompactor:
    """Compaction over a fixed set of caches (every layer's K and V); build once, call every step.

    Args:
        caches: tensors [slots, ...] whose rows are contiguous (any dtype and trailing shape, one row per
            token slot). They may differ in row size. The Triton path keeps their addresses, so the caches
            must not be reallocated.

    Raises:
        ValueError: no cache is given, or a cache's rows are not contiguous.
    """

    def __init__(self, caches: Sequence[torch.Tensor]) -> None:
        if not caches:
            raise ValueError("KVCompactor needs at least one cache tensor")
        for c in caches:
            if not c[0].is_contiguous():
                raise ValueError(
                    f"cache rows must be contiguous; got shape {tuple(c.shape)}, strides {c.stride()}"
                )
        self.caches = list(caches)
        self._table = None
        if use_triton(self.caches[0]):
            from dflash_kernels.kv_compact.kernel import PointerTable

            self._table = PointerTable(self.caches)

    def __call__(self, slots: torch.Tensor, path: torch.Tensor, accept_lens: torch.Tensor) -> None:
        """Copies row slots[b, path[b, d]] to slots[b, d] for d < accept_lens[b], in every cache.

        Overlaps are safe because a tree node's id is never below its depth and a path's ids ascend: row d
        is written only after every source below it was read, and no later source lies at or below d.

        Args:
            slots: int64 [bs, N], the cache row of each tree node; no row is shared between live requests.
            path: int32 [bs, D] from `accept_tree`.
            accept_lens: int32 [bs].
        """
        if self._table is not None:
            from dflash_kernels.kv_compact.kernel import compact_kv_triton

            compact_kv_triton(self._table, slots, path, accept_lens)
        else:
            from dflash_kernels.kv_compact.reference import compact_kv_torch

            compact_kv_torch(self.caches, slots, path, accept_lens)


def compact_kv(
    caches: Sequence[torch.Tensor], slots: torch.Tensor, path: torch.Tensor, accept_lens: torch.Tensor
) -> None:
    """One-off `KVCompactor(caches)(slots, path, accept_lens)`."""
    KVCompactor(caches)(slots, path, accept_lens)
