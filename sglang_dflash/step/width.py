"""What one decode step knows before its first stage runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sglang_dflash.step.noise import StepNoise
from sglang_dflash.step.sampling import SamplingParams


@dataclass(frozen=True)
class Width:
    """How wide one step is. A per-step variable: nothing below keeps it beyond the step.

    A plain step, 1 x 1, has no drafter pass and no tree.

    Attributes:
        nodes: N, rows verified per request, the root (bonus token) included.
        block: B, rows of the draft block, the anchor included.
    """

    nodes: int
    block: int

    @property
    def depth(self) -> int:
        """L = B - 1, the deepest a tree can be."""
        return self.block - 1

    @property
    def slots(self) -> int:
        """KV slots a step writes past each request's committed length."""
        return max(self.nodes, self.block)

    @property
    def most(self) -> int:
        """The most tokens a step can commit per request, bonus included: a recalled path may be as long as
        the tree."""
        return self.nodes

    @property
    def drafted(self) -> int:
        """The deepest that the drafter's candidates reach in the tree."""
        return min(self.nodes, self.block) - 1

    @property
    def plain(self) -> bool:
        """No draft: one row per request, one token."""
        return self.nodes == 1

    def __str__(self) -> str:
        return f"{self.nodes}x{self.block}"


PLAIN = Width(1, 1)


@dataclass
class Step:
    """The step's fixed facts, on the device.

    Attributes:
        width: N and B of this step.
        anchor: int64 [bs], each request's last committed token, whose KV is not yet written.
        prefix_lens: int64 [bs], committed tokens with KV in the cache.
        slots: int64 [bs, width.slots], cache slots of positions prefix .. prefix + slots - 1.
        plan: SGLang's ``KVLocPlan`` over the slots; only the bridge looks inside.
        host_lens: int [bs] on the CPU, an upper bound of prefix_lens that costs no device read.
        host_exact: host_lens are the prefixes' own; else the reserved lengths, the step's rows included.
        sampling: the requests' sampling parameters, None where the batch carries none.
        noise: the sampling noise by request and depth, None where every request is greedy.
        deepest: D, the longest path below a root: L, or N - 1 where text is recalled and that is deeper.
    """

    width: Width
    anchor: torch.Tensor
    prefix_lens: torch.Tensor
    slots: torch.Tensor
    plan: Any
    host_lens: torch.Tensor
    host_exact: bool = True
    sampling: SamplingParams | None = None
    noise: StepNoise | None = None
    deepest: int = -1

    def __post_init__(self) -> None:
        if self.deepest < 0:
            self.deepest = self.width.depth

    @property
    def batch_size(self) -> int:
        return self.anchor.shape[0]

    @property
    def sampled(self) -> torch.Tensor | None:
        """bool [bs], which requests draw their tokens; None where none does."""
        return None if self.noise is None or self.sampling is None else self.sampling.top_k > 1

    def sample(self, params: SamplingParams) -> None:
        """Let the step's requests sample by ``params``."""
        self.sampling = params
        self.noise = StepNoise.of(params, self.prefix_lens, self.deepest + 1)

    def host_bound(self, rows: int) -> tuple[torch.Tensor, int]:
        """Each request's greatest length with ``rows`` rows of this step, on the host, and their sum."""
        bound = self.host_lens + rows if self.host_exact else self.host_lens
        return bound, int(bound.sum())

    def mean_length(self) -> float:
        """Cached tokens per request, from the host's bounds."""
        return float(self.host_lens.sum()) / len(self.host_lens)
