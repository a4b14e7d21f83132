"""How much memory a command may still take here, and how much the commands take."""

from __future__ import annotations

import re
from pathlib import Path

#: Bytes that each takes at its most, with the embedded pair.
SERVE, DEMO, TESTS = int(4e9), int(8e9), int(15e9)


def available(root: Path = Path("/")) -> int | None:
    """Free bytes of this machine, or within the container's limit where those are fewer; None: unknown."""
    found = []
    try:
        text = (root / "proc/meminfo").read_text()
        found += [int(kb) * 1024 for kb in re.findall(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)]
    except OSError:
        pass
    group = root / "sys/fs/cgroup"
    try:
        used = int((group / "memory.current").read_text())
        # The page cache of files is given back on demand.
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        limit = int((group / "memory.max").read_text())
        found.append(max(0, limit - used + int(stat.get("inactive_file", 0))))
    except (OSError, ValueError):
        pass  # no cgroup v2, or its limit is "max"
    return min(found, default=None)
