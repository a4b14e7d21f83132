"""``python -m sglang.launch_server`` with a quiet Ctrl-C: what ``sglang-dflash serve`` turns into.

A terminal sends SIGINT to every process of the server. Python's own handler then ends each with a
traceback, at any stage of its start and, in the main process, even after uvicorn's orderly shutdown.
Here the main process leaves through SystemExit, which runs the ``finally`` blocks that end its children,
and the children do not see the signal.
"""

from __future__ import annotations

import runpy
import signal
import sys
import threading
from multiprocessing.process import BaseProcess
from types import FrameType

_INTERRUPTED = 128 + signal.SIGINT
_start = BaseProcess.start


def _stop(signum: int, frame: FrameType | None) -> None:
    # A second Ctrl-C must not break off the clean-up of the first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(_INTERRUPTED)


def _start_deaf(process: BaseProcess) -> None:
    """Start a child that inherits an ignored SIGINT; only the main thread may change handlers."""
    if threading.current_thread() is not threading.main_thread():
        _start(process)
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _start(process)
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, _stop)
    BaseProcess.start = _start_deaf  # type: ignore[assignment, method-assign]
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
