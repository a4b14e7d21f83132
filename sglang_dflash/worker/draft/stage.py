"""The draft block: ``[anchor, mask, mask, ...]`` through the drafter, once (arXiv 2602.06036, 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sglang_dflash.step.selector import Selector, edges_of
from sglang_dflash.step.width import Step
from sglang_dflash.worker.draft.couple import POOL, couple, mixture, race_for

if TYPE_CHECKING:
    from sglang_dflash.upstream.bridge import Bridge


@dataclass
class Candidates:
    """What the drafter thinks of each position after the anchor.

    Attributes:
        logprobs: float32 [bs, L, K], descending in K; log-softmax over the whole vocabulary, of a sampled
            request the log of each candidate's chance to be the sample (`couple`).
        ids: int64 [bs, L, K], token ids.
        edges: float32 [bs, L, K, K], the same of each candidate (last) given each of the position before
            it, as a selector sees it; None where positions are drafted without knowing of each other.
    """

    logprobs: torch.Tensor
    ids: torch.Tensor
    edges: torch.Tensor | None = None


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
        module = bridge.selector()
        self.selector = None if module is None else Selector(module)
        # A selector has learned to order as many candidates as it was trained with.
        self.top_k = top_k if self.selector is None else self.selector.top_k
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
        return self._candidates(step, hidden[:, self.rows])

    def _candidates(self, step: Step, hidden: torch.Tensor) -> Candidates:
        """Of hidden [bs, L, H]; where requests sample, chances of their samples."""
        shape = (*hidden.shape[:2], self.top_k)
        rows = hidden.flatten(0, 1)
        if step.noise is None or step.sampling is None:
            logprobs, ids = self.bridge.head_topk(rows, self.top_k)
            plain = Candidates(logprobs.view(shape), ids.view(shape))
            if self.selector is not None:
                plain.edges = edges_of(plain.logprobs, self.selector.pairs(step.anchor, plain.ids, hidden))
            return plain
        depth, vocab = step.width.depth, self.bridge.vocab_size()
        race = race_for(step.noise, step.sampling, depth, vocab)
        values, ids = self.bridge.head_topk(rows, min(max(POOL, self.top_k), vocab), race)
        params = step.sampling.per_row(depth)
        found = couple(values, ids, race, params, min(self.top_k, ids.shape[1]))
        drawn = Candidates(found.chances.view(shape), found.ids.view(shape))
        if self.selector is not None:
            pairs = self.selector.pairs(step.anchor, drawn.ids, hidden).flatten(0, 1)
            log_q = edges_of(found.log_q, pairs / params.temperature.view(-1, 1, 1))
            greedy = (params.top_k <= 1).view(-1, 1, 1)
            drawn.edges = torch.where(greedy, log_q, mixture(log_q, found.gumbel[:, None])).view(*shape, -1)
        return drawn
