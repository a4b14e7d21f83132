"""Make the accepted path the request's history: target KV, drafter KV."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from dflash_kernels import Accepted, KVCompactor

from sglang_dflash.step.width import Step
from sglang_dflash.worker.commit.saved import SavedRows
from sglang_dflash.worker.verify import Verified

if TYPE_CHECKING:
    from sglang_dflash.upstream.bridge import Bridge


class CommitStage:
    """Compacts the target's KV rows and appends the drafter's.

    Where the accepted path is the spine, its rows already lie at depth order and nothing moves. What the
    drafter gets of plain steps, which nobody drafts from, is saved up: `SavedRows`.
    """

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge
        self._compactor: KVCompactor | None = None
        self._saved = SavedRows(self._write) if bridge.may_write_later() else None

    def settle(self) -> None:
        """Something else than a decode step follows: the drafter's cache is made whole."""
        if self._saved is not None:
            self._saved.settle()

    def begin(self, step: Step, requests: Sequence[Any]) -> None:
        """A step begins, which may draft, or be of other requests than the saved rows."""
        if self._saved is not None and (not step.width.plain or self._saved.of_others(requests)):
            self._saved.settle()

    def __call__(self, accepted: Accepted, verified: Verified, step: Step, requests: Sequence[Any]) -> None:
        """``requests``: the step's, SGLang's objects in the step's order."""
        if step.width.plain:  # the root's row lies where it belongs
            self._append_root(accepted, verified, step, requests)
            return
        if self._compactor is None:
            self._compactor = KVCompactor(self.bridge.target_caches())
        self._compactor(step.slots[:, : step.width.nodes], accepted.path, accepted.accept_lens)

        # Only the path's rows feed the drafter: D + 1 rows instead of N.
        path = accepted.path.clamp(min=0).long()
        hidden = verified.hidden.gather(1, path[:, :, None].expand(-1, -1, verified.hidden.shape[-1]))
        positions = step.prefix_lens[:, None] + torch.arange(path.shape[1], device=path.device)
        slots = self.bridge.drafter_slots(step, path.shape[1])
        self.bridge.append_drafter_kv(hidden, slots, positions, accepted.accept_lens)

    def _append_root(
        self, accepted: Accepted, verified: Verified, step: Step, requests: Sequence[Any]
    ) -> None:
        slots = self.bridge.drafter_slots(step, 1)
        if self._saved is None:
            positions = step.prefix_lens[:, None].long()
            self.bridge.append_drafter_kv(verified.hidden, slots, positions, accepted.accept_lens)
            return
        hidden = verified.hidden[:, 0]
        if hidden.is_cuda:  # a graph's next replay writes its outputs to the same place
            hidden = hidden.clone()
        self._saved.add(requests, hidden, slots[:, 0].clone(), step.prefix_lens.to(torch.int64, copy=True))

    def _write(self, hidden: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> None:
        one = torch.ones(len(hidden), dtype=torch.int32, device=hidden.device)
        self.bridge.append_drafter_kv(hidden[:, None], slots[:, None], positions[:, None], one)
