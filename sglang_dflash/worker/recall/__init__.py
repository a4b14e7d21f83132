"""Stage 1b: what followed the longest match of the text's end, earlier in the same request."""

from sglang_dflash.worker.recall.stage import Recalled, RecallStage

__all__ = ["RecallStage", "Recalled"]
