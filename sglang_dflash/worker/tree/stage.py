"""Best-first tree over prefix probabilities (DDTree, arXiv 2604.12989), calibrated per depth."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from dflash_kernels import Chain, DraftTree, build_tree

from sglang_dflash.errors import UserError
from sglang_dflash.step.width import Step
from sglang_dflash.worker.draft import Candidates
from sglang_dflash.worker.tree.guard import cut, silence, usable
from sglang_dflash.worker.tree.reach import reach

Rewrite = Callable[[Candidates, Step, Any], Candidates]


def load_rewrite(name: str) -> Rewrite | None:
    """The function named by ``SGLANG_DFLASH_CANDIDATES`` ("module:function"), or None for "".

    Raises UserError when it cannot be imported.
    """
    if not name:
        return None
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"SGLANG_DFLASH_CANDIDATES={name!r} cannot be imported ({error}); write it as module:function"
        ) from error


class TreeStage:
    """Turns candidates into the N most probable prefixes, as a tree.

    What of the top-1 chain (spine) is in the tree comes first, at ids that are its depths. Nothing
    forces it in: where the drafter undervalues deep paths, a fitted depth bonus says so.

    Args:
        depth_bonus: fitted log-bonus per depth (L floats) or None, see docs/training.md.
        rewrite: replaces the drafter's candidates, for tests and experiments.
        tiers: numbers of nodes of which the drafter's expectation is asked for (`reach`); none asks nothing.
        device: where the bonus lives.
    """

    def __init__(
        self,
        *,
        depth_bonus: Sequence[float] | None,
        rewrite: Rewrite | None,
        device: torch.device | str,
        tiers: Sequence[int] = (),
    ) -> None:
        self.rewrite = rewrite
        self.tiers = tiers
        self.set_depth_bonus(depth_bonus, device)

    def set_depth_bonus(self, bonus: Sequence[float] | None, device: torch.device | str) -> None:
        self.depth_bonus = (
            None if bonus is None else torch.tensor(list(bonus), dtype=torch.float32, device=device)
        )

    def rewritten(self, candidates: Candidates, step: Step, batch: object) -> Candidates:
        return candidates if self.rewrite is None else self.rewrite(candidates, step, batch)

    def __call__(
        self, candidates: Candidates, step: Step, chain: Chain | None = None, *, expect: bool = True
    ) -> tuple[DraftTree, torch.Tensor | None]:
        """The tree of the step's width, and what is expected of it.

        The latter is None without ``tiers``, and where ``expect`` says that nobody learns from it now.
        """
        good = usable(candidates)
        candidates = silence(candidates, good)
        tree = build_tree(
            step.anchor,
            candidates.logprobs,
            candidates.ids,
            num_nodes=step.width.nodes,
            depth_bonus=None if self.depth_bonus is None else self.depth_bonus[: step.width.depth],
            edges=candidates.edges,
            chain=chain,
        )
        cut(tree, good)
        tiers = [t for t in self.tiers if t <= step.width.nodes] if expect else []
        if not tiers:
            return tree, None
        return tree, reach(tree, candidates, tiers, step.sampled, chain)
