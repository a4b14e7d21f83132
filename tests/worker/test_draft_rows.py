"""Which rows of the drafter's block are drafts: z-lab's layout, and the one where the anchor's row drafts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_dflash.step.width import Width
from sglang_dflash.worker.draft import DraftStage

BLOCK, VOCAB = 5, 64


class Bridge:
    """A drafter whose row i says token 10 + i, whatever the head."""

    def run_drafter(
        self, batch: object, step: Any, ids: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        self.ids, self.positions = ids.clone(), positions.clone()
        rows = torch.nn.functional.one_hot(torch.arange(10, 10 + BLOCK), VOCAB).float()
        return rows.expand(ids.shape[0], -1, -1)

    def selector(self) -> None:
        return None

    def head_topk(self, hidden: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden.log_softmax(-1).topk(k)


@pytest.mark.parametrize(("anchor_first", "first"), [(False, 11), (True, 10)])
def test_the_drafts_rows(anchor_first: bool, first: int) -> None:
    bridge = Bridge()
    stage = DraftStage(bridge, mask_token_id=9, top_k=2, anchor_first=anchor_first)  # type: ignore[arg-type]
    step = SimpleNamespace(
        batch_size=2,
        width=Width(nodes=8, block=BLOCK),
        anchor=torch.tensor([3, 4]),
        prefix_lens=torch.tensor([7, 20]),
        noise=None,
        sampling=None,
    )
    got = stage(step, None)  # type: ignore[arg-type]
    assert got.ids[:, :, 0].tolist() == [list(range(first, first + BLOCK - 1))] * 2
    # The block itself is the same in both: the drafter was trained with all its rows.
    assert bridge.ids.tolist() == [[3, 9, 9, 9, 9], [4, 9, 9, 9, 9]]
    assert bridge.positions[:, 0].tolist() == [7, 20]
