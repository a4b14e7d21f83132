"""One width per scheduling round: memory check, allocation and step all read the same value.

The choice is made before SGLang checks memory for the round's decode step. The step before is then
still in flight, so each request may grow by what that one can commit before this one writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from sglang_dflash.step.report import StepResult
from sglang_dflash.step.width import PLAIN, Width
from sglang_dflash.worker.width.control import ControlledWidth
from sglang_dflash.worker.width.policy import Policy, WidthPolicy

SHARED_ROUNDS = 64


@dataclass
class _Launched:
    """The step in flight, and when it was launched; ``at`` is None where something else ran since."""

    width: Width
    requests: int = 0
    length: float = 0.0
    at: float | None = None


class WidthStage:
    """The width in force, and what steps teach its policy.

    A step's cost is the time from its launch to the next step's: under overlap that is what it holds the
    device and the host for, the scheduler's work included.

    Args:
        policy: asked once per round.
        widest: the greatest width; what every buffer and reserve was sized for.
        share: gives every tensor-parallel rank rank 0's list; None where there is one rank. Their clocks
            differ, and all must choose alike.
        clock: seconds.
    """

    def __init__(
        self,
        policy: Policy,
        widest: Width,
        *,
        share: Callable[[list[float]], list[float]] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._share, self._rounds = share, 0
        self.policy = policy
        self.widest = widest
        self.now = widest
        self._clock = clock
        self._flying = _Launched(widest)
        self._length = 0.0

    @property
    def learner(self) -> WidthPolicy | None:
        """The policy, where it is one that learns; None while another setting is in force: what that one's
        steps show would be knowledge that a server with ``auto`` alone has not."""
        if self.pinned:
            return None
        policy = self.policy.auto if isinstance(self.policy, ControlledWidth) else self.policy
        return policy if isinstance(policy, WidthPolicy) else None

    @property
    def pinned(self) -> bool:
        """Whether a control file holds another setting than ``auto``."""
        return isinstance(self.policy, ControlledWidth) and not self.policy.learning

    def begin(self, requests: int, sampled_share: float) -> None:
        """A scheduling round begins: choose."""
        self._rounds += 1
        if self._share is not None and self.learner is not None and self._rounds % SHARED_ROUNDS == 0:
            self.learner.load(self._share(self.learner.state()))
        self.now = self.policy.choose(requests, self._length, sampled_share)

    def narrow(self) -> bool:
        """KV is short: take the width that needs least; False when it is in force already."""
        if self.now == PLAIN:
            return False
        self.now = PLAIN
        return True

    def launch(self, requests: int) -> Width:
        """The round's step is launched now; its width."""
        now, last = self._clock(), self._flying
        if self.learner is not None and last.at is not None:
            self.learner.cost.observe(last.width, last.requests, last.length, (now - last.at) * 1e3)
        self._flying = _Launched(self.now, requests, self._length, now)
        return self.now

    def interrupt(self) -> None:
        """Something else than a decode step runs: the last step's time is not to be had."""
        self._flying.at = None

    def note_length(self, tokens: float) -> None:
        """Cached tokens of a request, on average over the launched batch; the next choice counts with it."""
        self._length = self._flying.length = tokens

    def observe(self, result: StepResult) -> None:
        """A step's outcome has reached the host."""
        if self.learner is not None:
            self.learner.gains.observe(
                result.width, result.sampled, result.accepted, result.reach, result.held
            )

    def reserve(self) -> int:
        """KV slots a request needs past its committed length for this round's step, in tokens.

        The host's committed length lags by what the step in flight commits.
        """
        return self._flying.width.most + self.now.slots


class _Process:
    """The stage of this process's worker: SGLang's hooks know no worker."""

    stage: WidthStage | None = None


def serve(stage: WidthStage | None) -> None:
    """Let SGLang's memory hooks of this process read this stage."""
    _Process.stage = stage


def serving() -> WidthStage | None:
    """The stage that memory hooks read; None before a tree worker is built."""
    return _Process.stage
