"""Stage 3: one target pass over all nodes, each seeing the prefix and its own ancestors."""

from sglang_dflash.worker.verify.stage import Verified, VerifyStage

__all__ = ["Verified", "VerifyStage"]
