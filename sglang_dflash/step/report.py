"""What a decode step tells the host, on the way its results take anyway.

The counts are one small tensor per step. SGLang copies it with the step's tokens and hands it back
when those are on the host, so nothing waits for it: not in the step, not in the scheduler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from dflash_kernels import Accepted, DraftTree

from sglang_dflash.step.timing import Laps

FALLBACK = -1


def is_cut(tree: DraftTree) -> torch.Tensor:
    """bool [bs]: the request's root has no child, so this step commits one token."""
    return tree.first_child[:, 0] < 0


def outcome(tree: DraftTree, accepted: Accepted) -> torch.Tensor:
    """int32 [bs]: KV rows moved (0: the path is the spine), or ``FALLBACK`` where there was no draft.

    A row moves when its node's id is not its depth, which is so exactly off the spine.
    """
    path = accepted.path
    depth = torch.arange(path.shape[1], device=path.device, dtype=path.dtype)
    moved = ((path != depth) & (path >= 0)).sum(1, dtype=torch.int32)
    return moved.masked_fill_(is_cut(tree), FALLBACK)


@dataclass(frozen=True)
class StepResult:
    """One step, on the host.

    Attributes:
        number: counts the worker's decode steps.
        nodes: N, rows verified per request.
        rows: per request, what ``outcome`` says.
        committed: tokens each request got from this step; 0 for one that had ended before.
        drafter_seconds, verify_seconds: None where nobody asked for times.
    """

    number: int
    nodes: int
    rows: list[int]
    committed: list[int]
    drafter_seconds: float | None
    verify_seconds: float | None

    @property
    def fallbacks(self) -> int:
        return self.rows.count(FALLBACK)


class Sink(Protocol):
    def observe(self, result: StepResult) -> None: ...


@dataclass(frozen=True)
class StepReport:
    """SGLang's ``DeviceAuxiliaryOutput`` (``managers/auxiliary_output.py``); ``rows`` is on the device."""

    number: int
    nodes: int
    rows: torch.Tensor
    laps: Laps
    sink: Sink

    def copy_to_host(self, copy_tensor: Callable[[torch.Tensor], torch.Tensor]) -> HostReport:
        return HostReport(self, copy_tensor(self.rows))


@dataclass(frozen=True)
class HostReport:
    """SGLang's ``HostAuxiliaryOutput``; ``rows`` is on the host once the step's copies are done."""

    device: StepReport
    rows: torch.Tensor

    def consume(self, batch: Any, commits: Sequence[Any]) -> None:
        drafter_seconds, verify_seconds = self.device.laps.seconds()
        self.device.sink.observe(
            StepResult(
                number=self.device.number,
                nodes=self.device.nodes,
                rows=self.rows.tolist(),
                committed=[0 if commit is None else len(commit.token_ids) for commit in commits],
                drafter_seconds=drafter_seconds,
                verify_seconds=verify_seconds,
            )
        )
