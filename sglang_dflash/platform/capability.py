"""What the CPU can do; imports nothing of SGLang, so that training need not wait for it."""

from __future__ import annotations

import functools

import torch


@functools.cache
def multiplies_bf16() -> bool:
    """Whether the CPU has bfloat16 matrix instructions (AVX512-BF16, AMX or Arm's)."""
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
