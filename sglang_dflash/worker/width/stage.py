"""One width per scheduling round: memory check, allocation and step all read the same value.

The choice is made before SGLang checks memory for the round's decode step. The step before is then
still in flight, so each request may grow by what that one can commit before this one writes.
"""

from __future__ import annotations

from typing import Protocol

from sglang_dflash.step.width import PLAIN, Width


class Policy(Protocol):
    """What decides: see ``policy.py``."""

    def choose(self, requests: int, length: float, sampled_share: float) -> Width: ...


class WidthStage:
    """The width in force.

    Args:
        policy: asked once per round.
        widest: the greatest width; what every buffer and reserve was sized for.
    """

    def __init__(self, policy: Policy, widest: Width) -> None:
        self.policy = policy
        self.widest = widest
        self.now = widest
        self._in_flight = widest
        self._length = 0.0

    def begin(self, requests: int, sampled_share: float) -> None:
        """A scheduling round begins: choose."""
        self.now = self.policy.choose(requests, self._length, sampled_share)

    def narrow(self) -> bool:
        """KV is short: take the width that needs least; False when it is in force already."""
        if self.now == PLAIN:
            return False
        self.now = PLAIN
        return True

    def launch(self) -> Width:
        """The round's step is launched now; its width."""
        self._in_flight = self.now
        return self.now

    def note_length(self, tokens: float) -> None:
        """Cached tokens of a request, on average over the step's batch; the next choice counts with it."""
        self._length = tokens

    def reserve(self) -> int:
        """KV slots a request needs past its committed length for this round's step, in tokens.

        The host's committed length lags by what the step in flight commits.
        """
        return self._in_flight.most + self.now.slots


class _Process:
    """The stage of this process's worker: SGLang's hooks know no worker."""

    stage: WidthStage | None = None


def serve(stage: WidthStage | None) -> None:
    """Let SGLang's memory hooks of this process read this stage."""
    _Process.stage = stage


def serving() -> WidthStage | None:
    """The stage that memory hooks read; None before a tree worker is built."""
    return _Process.stage
