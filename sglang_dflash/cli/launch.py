"""``python -m sglang.launch_server`` with a quiet Ctrl-C: what ``sglang-dflash serve`` turns into.

Python's own SIGINT handler ends SGLang with a traceback, at any stage of its start and after uvicorn's
orderly shutdown. Leaving through SystemExit instead runs the same ``finally`` blocks, which end the
server's children.
"""

from __future__ import annotations

import runpy
import signal
import sys
from types import FrameType

_INTERRUPTED = 128 + signal.SIGINT


def _stop(signum: int, frame: FrameType | None) -> None:
    # A second Ctrl-C must not break off the clean-up of the first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(_INTERRUPTED)


# SGLang's children import this module under another name and keep their own handlers.
if __name__ == "__main__":
    signal.signal(signal.SIGINT, _stop)
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
