"""Which processor this is."""

from __future__ import annotations

import platform
import re
from pathlib import Path


def processor_name() -> str:
    """The processor's name as the system gives it, with what decides its speed here: "... (avx512_bf16)"."""
    name, flags = platform.processor() or platform.machine(), ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text()
        if found := re.search(r"^model name\s*:\s*(.+)$", text, re.M):
            name = found[1]
        if found := re.search(r"^flags\s*:\s*(.+)$", text, re.M):
            flags = " ".join(
                f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in found[1].split()
            )
    return f"{name} ({flags})" if flags else name
