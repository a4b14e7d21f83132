"""The drafter's KV cache, cleaned of what is not a number."""

from __future__ import annotations

import logging
from typing import Any

import torch

logger = logging.getLogger("sglang_dflash")

_CLEANED = (torch.float32, torch.bfloat16, torch.float16)


def clean_drafter_cache(runner: Any) -> None:
    """Set NaN and infinity in the drafter's whole KV cache to 0, on the device, in place.

    A row of zeros adds nothing to attention's sum; the requests that read it draft a little worse
    until it is gone. The whole pool is cleaned, not the ill request's rows: a prefix in the radix
    cache outlives its request. Pools in 8-bit formats are left as they are; a request that meets a
    NaN there falls back until its rows are freed.

    Args:
        runner: the drafter's ``ModelRunner``.
    """
    pool = runner.token_to_kv_pool
    cleaned = False
    for name in ("k_buffer", "v_buffer"):
        buffers = getattr(pool, name, None)
        for buffer in buffers if isinstance(buffers, list) else ():
            if buffer.dtype in _CLEANED:
                buffer.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
                cleaned = True
    if cleaned:
        logger.info("cleaned the drafter's KV cache of NaN")
    else:
        logger.warning("the drafter's %s cannot be cleaned of NaN", type(pool).__name__)
