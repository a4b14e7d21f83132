"""Server arguments that the CPU platform sets when the user did not."""

from __future__ import annotations

import logging
from typing import Any

from sglang_dflash.platform import ATTENTION_BACKEND

logger = logging.getLogger(__name__)


def apply(server_args: Any) -> None:
    """Make our attention backend the default of every pass.

    SGLang's own rule for ``device == "cpu"`` has run by now and wrote ``intel_amx`` (or
    ``torch_native`` on Arm) without asking the platform; both fail here on a tree verify.
    What the user named is in the raw input and stays.
    """
    raw = getattr(server_args, "_raw_input", None) or {}
    if raw.get("attention_backend") is None:
        server_args.attention_backend = ATTENTION_BACKEND
    elif raw["attention_backend"] != ATTENTION_BACKEND:
        logger.warning(
            "The CPU platform is tested with --attention-backend %s; got %s.",
            ATTENTION_BACKEND,
            raw["attention_backend"],
        )
