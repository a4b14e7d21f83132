"""When a text changes kind: what was learned of it lately holds no more."""

from __future__ import annotations

import numpy as np

# In shares of what was foretold: smaller differences are the text's usual wavering, and so much of greater
# ones, added up over requests' steps, is a change. A step of one request wavers by 0.3 (gain.SPREAD).
SLACK = 0.1
CHANGE = 3.0


class Turns:
    """Two cumulative sums per class of requests (E. S. Page, Biometrika 1954), of how much more and how much
    less the drafter promises than on its recent average.

    A text on which the drafter is a quarter worse is noticed after some 20 requests' steps; one that only
    wavers is taken for another about once in 3,000.
    """

    def __init__(self) -> None:
        self._sums = np.zeros((2, 2))
        self._count = np.zeros(1)

    @property
    def count(self) -> int:
        """Changes until now."""
        return int(self._count[0])

    def observe(self, c: int, surprise: float, worth: float) -> bool:
        """Whether the text of class ``c`` has changed, by one more step.

        Args:
            surprise: what the drafter promised over what was foretold, less 1.
            worth: steps of one request that it counts as.
        """
        moved = self._sums[c] + worth * (np.array([surprise, -surprise]) - SLACK)
        self._sums[c] = np.maximum(moved, 0.0)
        if self._sums[c].max() < CHANGE:
            return False
        self._sums[c] = 0.0
        self._count += 1
        return True

    def parts(self) -> tuple[np.ndarray, ...]:
        """What is learned, for :meth:`Gains.state`."""
        return self._sums, self._count
