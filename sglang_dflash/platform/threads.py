"""How many OpenMP threads to use: the cores that are really free at start.

An OpenMP team waits for its slowest member, so one thread more than there are free cores
costs far more than it brings: beside one busy process on a two-core machine, two threads
fell from 16 to 2 tokens/s.
"""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path

logger = logging.getLogger(__name__)


#: Seconds over which the load is sampled. The load average would still hold the installation
#: that ended a minute ago.
SAMPLE_SECONDS = 0.3
#: Share of a core that background noise may take before the core counts as busy.
NOISE = 0.35


def free_threads(cores: int, busy: float) -> int:
    """Threads for ``cores`` usable physical cores of which ``busy`` are in use (>= 1)."""
    return min(cores, max(1, math.floor(cores - busy + NOISE)))


def allowed_cpus() -> list[int]:
    """Logical CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def usable_cores(cpus: int) -> int:
    """Physical cores among ``cpus`` logical ones, within a container's CPU quota."""
    import psutil

    cores = min(cpus, psutil.cpu_count(logical=False) or cpus)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, math.floor(int(quota) / int(period)))
    except (OSError, ValueError):
        pass  # no cgroup v2, or its quota is "max"
    return max(1, cores)


def busy_cores(cpus: list[int]) -> float:
    """Cores of ``cpus`` that others keep busy, sampled while this process sleeps."""
    import psutil

    shares = psutil.cpu_percent(interval=SAMPLE_SECONDS, percpu=True)
    return sum(shares[cpu] for cpu in cpus if cpu < len(shares)) / 100


def pin_omp_threads() -> int:
    """Choose the thread count once and hand it to child processes through ``OMP_NUM_THREADS``.

    A value that is already set wins. Returns the number of threads.
    """
    import torch

    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given) > 0:
        return int(given)
    cpus = allowed_cpus()
    cores, busy = usable_cores(len(cpus)), busy_cores(cpus)
    threads = free_threads(cores, busy)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    logger.info(
        "CPU platform: %d OpenMP thread(s): %d core(s), %.1f busy. Set OMP_NUM_THREADS to choose.",
        threads,
        cores,
        busy,
    )
    return threads
