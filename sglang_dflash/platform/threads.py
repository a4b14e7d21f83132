"""How many OpenMP threads to use: the cores that are really free at start.

An OpenMP team waits for its slowest member, so one thread more than there are free cores
costs far more than it brings: beside one busy process on a two-core machine, two threads
fell from 16 to 2 tokens/s.
"""

from __future__ import annotations

import logging
import math
import os

logger = logging.getLogger(__name__)


def free_threads(cores: int, load: float) -> int:
    """Threads for ``cores`` usable physical cores under a load average of ``load`` (>= 1)."""
    return min(cores, max(1, math.floor(cores - load + 0.1)))


def usable_cores() -> int:
    """Physical cores that this process may run on."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or allowed
    return max(1, min(allowed, physical))


def pin_omp_threads() -> int:
    """Choose the thread count once and hand it to child processes through ``OMP_NUM_THREADS``.

    A value that is already set wins. Returns the number of threads.
    """
    import torch

    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given) > 0:
        return int(given)
    cores, load = usable_cores(), os.getloadavg()[0]
    threads = free_threads(cores, load)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    logger.info(
        "CPU platform: %d OpenMP thread(s): %d core(s), load average %.2f. Set OMP_NUM_THREADS to choose.",
        threads,
        cores,
        load,
    )
    return threads
