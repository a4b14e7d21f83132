"""Entry point of the CPU platform (group ``sglang.srt.platforms``)."""

from __future__ import annotations

import os

PLATFORM_CLASS = "sglang_dflash.platform.cpu:DFlashCpuPlatform"


def activate() -> str | None:
    """Name the platform class where no accelerator is present, else ``None``.

    SGLang calls this in every process, also where a GPU serves: it must stay cheap and
    must not initialise CUDA. ``SGLANG_USE_CPU_ENGINE=1`` asks for SGLang's own CPU engine.

    Raises:
        SystemExit: with one line. SGLang only logs an ``Exception`` raised here and would
            then start without a platform.
    """
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None
    try:
        return None if has_accelerator() else PLATFORM_CLASS
    except Exception as error:
        raise SystemExit(
            f"sglang-dflash: cannot tell whether this machine has an accelerator ({error}); set "
            "SGLANG_PLUGINS=dflash_tree to start without the CPU platform."
        ) from error


def has_accelerator() -> bool:
    """Whether torch sees any accelerator that SGLang has a platform for.

    ``is_available`` asks the driver (NVML where possible) and leaves no CUDA context behind.
    """
    import torch

    if torch.cuda.is_available() or torch.xpu.is_available():
        return True
    if getattr(torch, "mps", None) is not None and torch.backends.mps.is_available():
        return True
    return any(
        hasattr(torch, name) and getattr(torch, name).is_available() for name in ("npu", "musa", "hpu")
    )
