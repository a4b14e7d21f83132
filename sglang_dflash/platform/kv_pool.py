"""SGLang's multi-head KV pool without its Triton launches."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import (
    KVWriteLoc,
    MHATokenToKVPool,
    move_kv_cache_native,
    unwrap_write_loc,
)


class CpuMHATokenToKVPool(MHATokenToKVPool):
    """``MHATokenToKVPool`` whose slot moves are plain torch.

    The parent warms a Triton copy kernel up in its constructor whatever the environment
    says, and moves slots with it unless ``SGLANG_NATIVE_MOVE_KV_CACHE`` is set.
    """

    def _init_kv_copy_and_warmup(self) -> None:
        self._kv_copy_config = None

    def _move_kv_cache_impl(self, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> None:
        """Copy the K and V rows of all layers from ``src_loc`` to ``tgt_loc`` (int ``[n]``).

        All sources are read before anything is written, so the two may overlap.
        """
        move_kv_cache_native(self.k_buffer, self.v_buffer, tgt_loc, src_loc)

    def set_kv_buffer(
        self,
        layer: Any,
        loc_info: Any,
        cache_k: torch.Tensor,
        cache_v: torch.Tensor,
        k_scale: float | None = None,
        v_scale: float | None = None,
        layer_id_override: int | None = None,
        dcp_kv_mask: torch.Tensor | None = None,
    ) -> None:
        """Write K and V rows ``[n, kv_heads, dim]`` at the slots of ``loc_info`` (int64 ``[n]``)."""
        if cache_v.dtype != cache_k.dtype:
            cache_v = cache_v.to(cache_k.dtype)  # the parent looks at K's alone
        if cache_k.dtype != self.store_dtype or dcp_kv_mask is not None or self.use_hnd:
            super().set_kv_buffer(
                layer, loc_info, cache_k, cache_v, k_scale, v_scale, layer_id_override, dcp_kv_mask
            )
            return
        loc = unwrap_write_loc(loc_info)[0]
        index = (layer.layer_id if layer_id_override is None else layer_id_override) - self.start_layer
        self.k_buffer[index].index_copy_(0, loc, cache_k)
        self.v_buffer[index].index_copy_(0, loc, cache_v)

    def set_kv_buffer_prefix_valid(
        self, layer: Any, loc_2d: torch.Tensor, commit_lens: torch.Tensor, *args: Any, **kwargs: Any
    ) -> None:
        """Write the first ``commit_lens`` [requests] rows of each request's ``loc_2d`` [requests, rows]."""
        if loc_2d.shape[1] == 1:  # a request commits at least its bonus token
            self.set_kv_buffer(layer, KVWriteLoc(loc_2d.reshape(-1), physical=True), *args, **kwargs)
        else:
            super().set_kv_buffer_prefix_valid(layer, loc_2d, commit_lens, *args, **kwargs)
