"""Walk the tree along the target's choices: greedy, or one exact sample per node."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dflash_kernels import Accepted, DraftTree, accept_tree

from sglang_dflash.step.sampling import argmax
from sglang_dflash.step.width import Step
from sglang_dflash.worker.accept.sample import sample_nodes
from sglang_dflash.worker.verify import Verified

if TYPE_CHECKING:
    import torch

    from sglang_dflash.upstream.bridge import Bridge


class AcceptStage:
    """Chooses the target's token at every node and follows it as far as the tree goes."""

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge

    def __call__(
        self, verified: Verified, tree: DraftTree, step: Step, batch: object
    ) -> tuple[Accepted, torch.Tensor]:
        """Returns the accepted path and the target's tokens, int64 [bs, N]."""
        params, noise = step.sampling, step.noise
        if params is None or noise is None:
            chosen = argmax(verified.logits)
        else:
            chosen = sample_nodes(verified.logits, params, noise, tree.depth)
        self.bridge.agree(chosen, sampled=noise is not None)
        chosen = chosen.view(-1, step.width.nodes)
        accepted = accept_tree(tree, chosen, step.prefix_lens, max_depth=step.deepest)
        return accepted, chosen
