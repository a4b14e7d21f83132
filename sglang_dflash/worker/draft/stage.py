"""The draft block: ``[anchor, mask, mask, ...]`` through the drafter, once (arXiv 2602.06036, 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sglang_dflash.step.width import Step
from sglang_dflash.worker.draft.couple import POOL, couple, race_for

if TYPE_CHECKING:
    from sglang_dflash.upstream.bridge import Bridge


@dataclass
class Candidates:
    """What the drafter thinks of each position after the anchor.

    Attributes:
        logprobs: float32 [bs, L, K], descending in K; log-softmax over the whole vocabulary, of a sampled
            request the log of each candidate's chance to be the sample (`couple`).
        ids: int64 [bs, L, K], token ids.
    """

    logprobs: torch.Tensor
    ids: torch.Tensor


class DraftStage:
    """Owns the block's ids.

    Args:
        bridge: the way to SGLang's drafter and the target's head.
        mask_token_id: the id whose embedding stands for "to be drafted".
        top_k: K, candidates kept per position.
        anchor_first: row i of the block predicts position i + 1 (`DrafterConfig.anchor_first`), so the
            drafts are rows 0 .. L-1. The last row's, one deeper than a tree can be, is not used; the block
            is as wide as in training, for its rows see each other.
    """

    def __init__(self, bridge: Bridge, *, mask_token_id: int, top_k: int, anchor_first: bool = False) -> None:
        self.bridge = bridge
        self.mask_token_id = mask_token_id
        self.top_k = top_k
        self.rows = slice(0, -1) if anchor_first else slice(1, None)
        self._ids: dict[int, torch.Tensor] = {}  # by block, [rows, B], the mask everywhere but in slot 0

    def _block(self, bs: int, block: int, device: torch.device) -> torch.Tensor:
        ids = self._ids.get(block)
        if ids is None or ids.shape[0] < bs:
            rows = max(bs, 0 if ids is None else 2 * ids.shape[0], 16)
            ids = torch.full((rows, block), self.mask_token_id, dtype=torch.int64, device=device)
            self._ids[block] = ids
        return ids[:bs]

    def __call__(self, step: Step, batch: object) -> Candidates:
        """Run the drafter once.

        Returns:
            Candidates of [bs, L, K] for positions prefix + 1 .. prefix + L.
        """
        bs, block = step.batch_size, step.width.block
        device = step.anchor.device
        ids = self._block(bs, block, device)
        # Slot 0 is the clean anchor; with the mask there too, accept length collapses.
        ids[:, 0].copy_(step.anchor)
        positions = step.prefix_lens[:, None] + torch.arange(block, device=device)
        hidden = self.bridge.run_drafter(batch, step, ids, positions)
        logprobs, token_ids = self._candidates(step, hidden[:, self.rows].reshape(bs * step.width.depth, -1))
        shape = (bs, step.width.depth, self.top_k)
        return Candidates(logprobs.view(shape), token_ids.view(shape))

    def _candidates(self, step: Step, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K log-probabilities and ids of each row; where requests sample, chances of their samples."""
        if step.noise is None or step.sampling is None:
            return self.bridge.head_topk(hidden, self.top_k)
        depth, vocab = step.width.depth, self.bridge.vocab_size()
        race = race_for(step.noise, step.sampling, depth, vocab)
        values, ids = self.bridge.head_topk(hidden, min(POOL, vocab), race)
        return couple(values, ids, race, step.sampling.per_row(depth), min(self.top_k, ids.shape[1]))
