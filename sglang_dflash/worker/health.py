"""Is the drafter well, and when its KV cache is to be cleaned.

A NaN in a drafter's cache row (an overflow of a 16-bit projection, a damaged row) makes every later
draft of the requests that read the row NaN. They fall back on the device at once; the host learns
of it with the step's results and has the cache cleaned before the next step.
"""

from __future__ import annotations

import logging

logger = logging.getLogger("sglang_dflash")

# A drafter whose weights are NaN breaks every step: cleaning after each would cost more than it can give.
_LONGEST_WAIT = 1024


class DrafterHealth:
    """Counts fallbacks by step and decides on cleaning; a cleaning that did not help doubles the wait."""

    def __init__(self) -> None:
        self.fallbacks = 0
        self.cleanings = 0
        self._ill = False
        self._cleaned_before: int | None = None
        self._wait = 0

    def note(self, step: int, fallbacks: int) -> None:
        """Results of step ``step`` have arrived; steps launched before the last cleaning say nothing new."""
        if fallbacks and not self.fallbacks:
            logger.warning(
                "the drafter returned NaN or infinity: such requests get one verified token per step, their "
                "text is not affected (metric sglang_dflash:drafter_fallbacks_total)"
            )
        self.fallbacks += fallbacks
        if self._cleaned_before is not None and step < self._cleaned_before:
            return
        if fallbacks:
            self._ill = True
        else:
            self._wait = 0

    def must_clean(self, step: int) -> bool:
        """Whether the cache is to be cleaned before step ``step``; True is said once per illness."""
        if not self._ill:
            return False
        if self._cleaned_before is not None and step < self._cleaned_before + self._wait:
            return False
        self._ill = False
        self._cleaned_before = step
        self._wait = min(max(1, 2 * self._wait), _LONGEST_WAIT)
        self.cleanings += 1
        return True
