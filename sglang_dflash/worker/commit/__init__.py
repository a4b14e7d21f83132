"""Stage 5: accepted rows move to the front, the drafter learns their features, lengths go out."""

from sglang_dflash.worker.commit.stage import CommitStage

__all__ = ["CommitStage"]
