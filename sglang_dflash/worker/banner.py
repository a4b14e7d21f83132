"""What a server says once at start about speculative decoding."""

from __future__ import annotations

import logging

from sglang_dflash import __version__
from sglang_dflash.settings import get_settings

logger = logging.getLogger("sglang_dflash")


def announce_chain(reason: str) -> None:
    """SGLang's own worker serves, by the off-switch or because trees cannot."""
    import torch

    logger.info("sglang-dflash %s: SGLang's built-in chain serves (%s)", __version__, reason)
    if not torch.cuda.is_available():
        logger.warning(
            "the built-in DFLASH chain on CPU turns temperature > 0 into argmax and fails in float32; "
            "the tree worker (unset SGLANG_DFLASH_MODE) does neither"
        )


def announce_tree(*, num_nodes: int, block: int, dtype: object, backend: str) -> None:
    logger.info(
        "sglang-dflash %s: draft trees on. nodes=%d block=%d target_dtype=%s attention=%s settings: %s",
        __version__,
        num_nodes,
        block,
        dtype,
        backend,
        get_settings().describe(),
    )
