"""The features of plain steps, saved up until the drafter's K and V are written from them together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

# So many steps, or so many rows, are projected together.
MOST_STEPS, MOST_ROWS = 8, 1024

Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


class SavedRows:
    """Rows of consecutive plain steps of the same requests.

    Whoever uses it settles before anything else may read or write the drafter's cache: before a prefill, a
    step that drafts, and a step of other requests. For only while the requests stay the same has none ended,
    and only a slot of one that ended may have a new owner, whose row would be overwritten.

    Args:
        write: projects features [R, k * H] and writes K and V at slots int64 [R] and positions int64 [R].
    """

    def __init__(self, write: Write) -> None:
        self._write = write
        self._requests: list[Any] = []
        self._steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._rows = 0

    def of_others(self, requests: Sequence[Any]) -> bool:
        """Whether rows are saved, and of other requests than these, compared as objects."""
        return bool(self._steps) and self._requests != requests

    def add(
        self, requests: Sequence[Any], hidden: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """A plain step's rows: nobody may change the tensors any more.

        Args:
            requests: the step's, in its order.
            hidden: [bs, k * H]. slots, positions: int64 [bs].
        """
        if not self._steps:
            self._requests = list(requests)
        self._steps.append((hidden, slots, positions))
        self._rows += len(hidden)
        if len(self._steps) >= MOST_STEPS or self._rows >= MOST_ROWS:
            self.settle()

    def settle(self) -> None:
        """Write what is saved."""
        if not self._steps:
            return
        hidden, slots, positions = (torch.cat(parts) for parts in zip(*self._steps, strict=True))
        self._steps, self._requests, self._rows = [], [], 0
        self._write(hidden, slots, positions)
