"""Stage 4: one target token per node, then the walk along the target's own choices."""

from sglang_dflash.worker.accept.stage import AcceptStage

__all__ = ["AcceptStage"]
