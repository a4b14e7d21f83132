"""SGLang's multi-head KV pool without its Triton launches."""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, move_kv_cache_native


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
