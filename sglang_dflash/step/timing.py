"""How long the drafter and the target take, without waiting for either.

On CUDA events are recorded and read when the step's results have arrived; on CPU, where operators
return when they are done, the clock is read.
"""

from __future__ import annotations

import time

import torch

START, DRAFTED, BUILT, VERIFIED, ACCEPTED, COMMITTED, DONE = range(7)


class Laps:
    """The marks of one step; ``mark`` is called at its start, after each of its stages, and at its end.

    Args:
        device: "cuda..." or "cpu".
        enabled: False costs nothing and measures nothing.
    """

    __slots__ = ("_cuda", "_enabled", "_marks")

    def __init__(self, device: torch.device | str, enabled: bool) -> None:
        self._cuda = str(device).startswith("cuda")
        self._enabled = enabled
        self._marks: list = []

    def mark(self) -> None:
        if not self._enabled:
            return
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> tuple[float, float, float] | None:
        """Drafter, verify and commit seconds; on CUDA only after the step's results have reached the host.

        None where they are not measured.
        """
        if not self._enabled:
            return None
        return (
            self._between(START, DRAFTED),
            self._between(BUILT, VERIFIED),
            self._between(ACCEPTED, COMMITTED),
        )

    def parts(self) -> tuple[float, float, float]:
        """Seconds of the drafter, the target and the rest of a rehearsed step."""
        if self._cuda:
            torch.cuda.synchronize()
        drafter, target = self._between(START, DRAFTED), self._between(BUILT, VERIFIED)
        return drafter, target, self._between(START, DONE) - drafter - target

    def _between(self, first: int, second: int) -> float:
        start, end = self._marks[first], self._marks[second]
        return start.elapsed_time(end) / 1e3 if self._cuda else end - start
