"""Stage 1: one drafter pass over the block gives top-K log-probabilities per position."""

from sglang_dflash.worker.draft.stage import Candidates, DraftStage

__all__ = ["Candidates", "DraftStage"]
