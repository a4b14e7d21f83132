"""Stage 0: how wide the step is, chosen once per scheduling round."""

from sglang_dflash.worker.width.policy import make_policy
from sglang_dflash.worker.width.stage import WidthStage, serve, serving

__all__ = ["WidthStage", "make_policy", "serve", "serving"]
