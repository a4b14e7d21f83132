"""Stage 2: the node budget's best prefixes, as a tree, built on the device."""

from sglang_dflash.worker.tree.stage import TreeStage

__all__ = ["TreeStage"]
