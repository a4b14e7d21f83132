"""Make the accepted path the request's history: target KV, drafter KV."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from dflash_kernels import Accepted, KVCompactor

from sglang_dflash.step.width import Step
from sglang_dflash.worker.verify import Verified

if TYPE_CHECKING:
    from sglang_dflash.upstream.bridge import Bridge


class CommitStage:
    """Compacts the target's KV rows and appends the drafter's.

    Where the accepted path is the spine, its rows already lie at depth order and nothing moves.
    """

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge
        self._compactor: KVCompactor | None = None

    def __call__(self, accepted: Accepted, verified: Verified, step: Step) -> None:
        if step.width.plain:  # the root's row lies where it belongs
            positions = step.prefix_lens[:, None].long()
            self.bridge.append_drafter_kv(step, verified.hidden, positions, accepted.accept_lens)
            return
        if self._compactor is None:
            self._compactor = KVCompactor(self.bridge.target_caches())
        self._compactor(step.slots[:, : step.width.nodes], accepted.path, accepted.accept_lens)

        # Only the path's rows feed the drafter: D + 1 rows instead of N.
        path = accepted.path.clamp(min=0).long()
        hidden = verified.hidden.gather(1, path[:, :, None].expand(-1, -1, verified.hidden.shape[-1]))
        positions = step.prefix_lens[:, None] + torch.arange(path.shape[1], device=path.device)
        self.bridge.append_drafter_kv(step, hidden, positions, accepted.accept_lens)
