"""What a decode step tells the host, on the way its results take anyway.

The counts are one small tensor per step. SGLang copies it with the step's tokens and hands it back
when those are on the host, so nothing waits for it: not in the step, not in the scheduler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from dflash_kernels import Accepted, DraftTree

from sglang_dflash.step.timing import Laps
from sglang_dflash.step.width import Width

FALLBACK = -1


def is_cut(tree: DraftTree) -> torch.Tensor:
    """bool [bs]: the request's root has no child, so this step commits one token."""
    return tree.first_child[:, 0] < 0


def outcome(tree: DraftTree, accepted: Accepted) -> torch.Tensor:
    """int32 [bs]: KV rows moved (0: the path is the spine), or ``FALLBACK`` where the draft was unusable.

    A row moves when its node's id is not its depth, which is so exactly off the spine. A plain step asked
    for no draft.
    """
    path = accepted.path
    if tree.num_nodes == 1:
        return torch.zeros(len(path), dtype=torch.int32, device=path.device)
    depth = torch.arange(path.shape[1], device=path.device, dtype=path.dtype)
    moved = ((path != depth) & (path >= 0)).sum(1, dtype=torch.int32)
    return moved.masked_fill_(is_cut(tree), FALLBACK)


def by_class(values: torch.Tensor, sampled: torch.Tensor | None) -> torch.Tensor:
    """float32 [2 (greedy, sampled), X]: ``values`` float32 [bs, X] summed over the requests of each class.

    Args:
        sampled: bool [bs], None where every request is greedy.
    """
    share = torch.zeros(len(values), device=values.device) if sampled is None else sampled.float()
    return torch.stack([1.0 - share, share]) @ values


@dataclass(frozen=True)
class StepResult:
    """One step, on the host.

    Attributes:
        number: counts the worker's decode steps.
        width: of the step.
        rows: per request, what ``outcome`` says.
        accepted: tokens of each request's pass, bonus included; 0 for one that had ended before.
        committed: those that it got; fewer where it ended among them.
        sampled: per request, whether it draws its tokens.
        reach: [2, T, L], what the drafter expected (``worker/tree/reach.py``); None where nobody asked.
        held: [2, D], what recalled chains were expected to bring (``worker/recall``); None where none was.
        seconds: of the drafter, of the target, and of the commit (KV rows moved, features to the drafter's K
            and V); None where nobody asked for times.
    """

    number: int
    width: Width
    rows: list[int]
    accepted: list[int]
    committed: list[int]
    sampled: list[bool]
    reach: np.ndarray | None
    held: np.ndarray | None
    seconds: tuple[float, float, float] | None

    @property
    def fallbacks(self) -> int:
        return self.rows.count(FALLBACK)


class Sink(Protocol):
    def observe(self, result: StepResult) -> None: ...


@dataclass(frozen=True)
class StepReport:
    """SGLang's ``DeviceAuxiliaryOutput`` (``managers/auxiliary_output.py``).

    ``rows``, ``accept_lens`` int32 [bs], ``reach`` and ``held`` are on the device and travel as one tensor.
    """

    number: int
    width: Width
    rows: torch.Tensor
    accept_lens: torch.Tensor
    sampled: list[bool]
    reach: torch.Tensor | None
    held: torch.Tensor | None
    laps: Laps
    sink: Sink

    def copy_to_host(self, copy_tensor: Callable[[torch.Tensor], torch.Tensor]) -> HostReport:
        parts = [self.rows, self.accept_lens, self.reach, self.held]
        flat = [part.reshape(-1).float() for part in parts if part is not None]
        return HostReport(self, copy_tensor(torch.cat(flat)))


@dataclass(frozen=True)
class HostReport:
    """SGLang's ``HostAuxiliaryOutput``; ``packed`` is on the host once the step's copies are done."""

    device: StepReport
    packed: torch.Tensor

    def consume(self, batch: Any, commits: Sequence[Any]) -> None:
        report, bs = self.device, len(commits)
        values = self.packed.numpy()
        rest = values[2 * bs :]
        reach, held = report.reach, report.held
        accepted = [0 if commit is None else int(n) for commit, n in zip(commits, values[bs:], strict=False)]
        report.sink.observe(
            StepResult(
                number=report.number,
                width=report.width,
                rows=values[:bs].astype(int).tolist(),
                accepted=accepted,
                committed=[0 if commit is None else len(commit.token_ids) for commit in commits],
                sampled=report.sampled,
                reach=None if reach is None else rest[: reach.numel()].reshape(reach.shape),
                held=None if held is None else rest[len(rest) - held.numel() :].reshape(held.shape),
                seconds=report.laps.seconds(),
            )
        )
