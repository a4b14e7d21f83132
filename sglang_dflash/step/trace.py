"""What happened in a step, for requests that ask to be told: the tree, the path through it, the time.

A request asks with ``"custom_params": {"dflash_trace": true}`` among its sampling parameters. Its answer's
``meta_info`` then has ``dflash``: a list as long as its output, with what :func:`described` returns at the
first token of each step and None elsewhere. (SGLang gives the key to all that answer beside it, with None.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from dflash_kernels import Accepted, DraftTree

from sglang_dflash.step.timing import Laps
from sglang_dflash.step.width import Width

ASKED = "dflash_trace"
ANSWERED = "dflash"


@dataclass(frozen=True)
class Chances:
    """How likely the drafter holds each node to be reached.

    Attributes:
        path: float32 [bs, N], the probability of the whole path from the root, which has 1.
        recalled: bool [bs, N], the node was proposed by the request's own text (too).
        count: float32 [bs], nodes of the tree; those behind are padding.
    """

    path: torch.Tensor
    recalled: torch.Tensor
    count: torch.Tensor

    @classmethod
    def of_roots(cls, bs: int, device: torch.device) -> Chances:
        """Of a plain step."""
        ones = torch.ones((bs, 1), device=device)
        return cls(ones, torch.zeros_like(ones, dtype=torch.bool), ones[:, 0])


@dataclass(frozen=True)
class StepTrace:
    """SGLang's ``DeviceAuxiliaryOutput`` (``managers/auxiliary_output.py``) of a step with traced requests.

    Attributes:
        asked: per request, whether it wants to know.
    """

    number: int
    width: Width
    asked: list[bool]
    tree: DraftTree
    chances: Chances
    accepted: Accepted
    laps: Laps

    def copy_to_host(self, copy_tensor: Callable[[torch.Tensor], torch.Tensor]) -> HostTrace:
        tree, accepted = self.tree, self.accepted
        # float32 holds a token id exactly.
        columns = (tree.tokens, tree.parents, self.chances.path, self.chances.recalled, accepted.path)
        counts = (self.chances.count[:, None], accepted.accept_lens[:, None])
        packed = torch.cat([column.float() for column in (*columns, *counts)], 1)
        return HostTrace(self, copy_tensor(packed))


@dataclass(frozen=True)
class HostTrace:
    """SGLang's ``HostAuxiliaryOutput``."""

    device: StepTrace
    packed: torch.Tensor

    def consume(self, batch: Any, commits: Sequence[Any]) -> None:
        for i, commit in enumerate(commits):
            if commit is None or not self.device.asked[i]:
                continue
            req = batch.reqs[i]
            if req.customized_info is None:
                req.customized_info = {}
            said = req.customized_info.setdefault(ANSWERED, [])
            said += [None] * (commit.output_index - len(said))
            said.append(self.described(i))
            said += [None] * (len(commit.token_ids) - 1)

    def described(self, row: int) -> dict[str, Any]:
        """One request's step.

        Returns:
            ``step`` its number; ``width``, such as "8x6"; ``tree``, [token, parent, probability of the path,
            recalled] of every node, the root (last token before the step) first; ``path``, the accepted nodes
            from the root on; ``ms`` of drafter, target and commit.
        """
        nodes = self.device.tree.num_nodes
        values = self.packed[row].tolist()
        tokens, parents, chance, recalled = (values[i * nodes : (i + 1) * nodes] for i in range(4))
        there, length = int(values[-2]), int(values[-1])
        seconds = self.device.laps.seconds() or ()
        return {
            "step": self.device.number,
            "width": str(self.device.width),
            "tree": [
                [int(tokens[n]), int(parents[n]), round(chance[n], 6), bool(recalled[n])]
                for n in range(there)
            ],
            "path": [int(n) for n in values[4 * nodes : 4 * nodes + length]],
            "ms": [round(1e3 * s, 3) for s in seconds],
        }
