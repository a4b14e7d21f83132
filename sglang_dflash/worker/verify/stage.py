"""Target verification of a tree: positions are prefix + depth, the mask is the ancestor relation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from dflash_kernels import DraftTree

from sglang_dflash.step.width import Step

if TYPE_CHECKING:
    from sglang_dflash.upstream.bridge import Bridge


@dataclass
class Verified:
    """What the target said at every node.

    Attributes:
        logits: [bs * N, V], row b * N + n follows node n of request b.
        hidden: [bs, N, k * H], the captured feature layers, for the drafter's cache.
        raw: SGLang's forward output, carried to the result.
    """

    logits: torch.Tensor
    hidden: torch.Tensor
    raw: Any


class VerifyStage:
    """Runs the target over the tree's nodes."""

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge

    def __call__(self, tree: DraftTree, step: Step, batch: object) -> Verified:
        positions = step.prefix_lens[:, None] + tree.depth
        raw = self.bridge.run_target(batch, step, tree, positions.reshape(-1))
        output = raw.logits_output
        bs, nodes = tree.tokens.shape
        return Verified(output.next_token_logits, output.hidden_states.view(bs, nodes, -1), raw)
