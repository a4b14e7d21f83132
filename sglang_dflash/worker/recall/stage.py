"""A request's own text as a source of drafts: models copy.

The longest match of the text's end earlier in the same request names what may follow, as one chain that
enters the tree beside the drafter's candidates and goes deeper than the block. How likely each of its
tokens is has been counted: by length of the match, depth and what the drafter says to it. A chain that does
not pay is improbable and takes no node. Only a request's own tokens are ever drafted for it; requests
share the counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from dflash_kernels import Accepted, Chain, recall

from sglang_dflash.step.history import TokenHistory
from sglang_dflash.step.report import by_class
from sglang_dflash.step.width import Step
from sglang_dflash.worker.draft import Candidates

MIN_MATCH = 3
MAX_MATCH = 32

# Upper bounds of the classes that are counted apart; what is longer belongs to the last.
MATCHES = (4, 8, 16)
DEPTHS = (1, 2, 4, 8)
# What the drafter says to a recalled token: its best, among its candidates, not among them, past its block.
BEST, AMONG, NONE, PAST = range(4)

# Chances before anything was counted, by what the drafter says, and how many counts they are worth.
FIRST = (0.9, 0.5, 0.25, 0.8)
WORTH = 8.0
# Counts fade with every step that recalled something, so that they are of the last few thousand.
FADE = 0.9995


@dataclass
class Recalled:
    """A step's chains.

    Attributes:
        chain: ids and log-probabilities, [bs, D]; -inf where nothing is recalled.
        cells: int64 [bs, D], the count that each token belongs to.
        found: bool [bs], whether the text's end has a match.
    """

    chain: Chain
    cells: torch.Tensor
    found: torch.Tensor

    def held(self, sampled: torch.Tensor | None) -> torch.Tensor:
        """float32 [2 (greedy, sampled), D]: summed over the requests of each class, the chance that the chain
        is right as far as each depth. What the width's policy learns from (``worker/width/beyond.py``).

        Args:
            sampled: bool [bs], None where every request is greedy.
        """
        return by_class(self.chain.logprobs.cumsum(1).exp(), sampled)


class RecallStage:
    """Owns the counts, on the device.

    Args:
        vocab: V, token ids that can be drafted are below it.
        deepest: D, tokens of every chain: what the widest tree can hold of it.
    """

    def __init__(self, device: torch.device | str, vocab: int, deepest: int) -> None:
        self._vocab, self.deepest = vocab, deepest
        shape = (2, len(MATCHES) + 1, len(DEPTHS) + 1, len(FIRST))
        first = torch.tensor(FIRST, device=device).expand(shape)
        self.tried = torch.full(shape, WORTH, device=device).flatten()
        self.right = (WORTH * first).flatten()
        self._first_right = self.right.clone()
        self._matches = torch.tensor(MATCHES, device=device)
        self._depths = torch.tensor(DEPTHS, device=device)
        self._strides = [shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3]]

    def __call__(
        self, history: TokenHistory, rows: torch.Tensor, step: Step, drafted: Candidates
    ) -> Recalled | None:
        """Chains, as long for a narrow step as for a wide one.

        On a CPU None where no request has one, so that text without repetition pays for the search alone; a
        GPU would have to wait for the answer.

        Args:
            history: committed tokens, the prompts' and the anchors included.
            rows: int64 [bs], the requests' rows in it.
            drafted: what the drafter says.
        """
        bound, _ = step.host_bound(1)
        matched, ids = recall(
            history.tokens,
            rows,
            step.prefix_lens + 1,
            count=self.deepest,
            min_match=MIN_MATCH,
            max_match=MAX_MATCH,
            longest=min(int(bound.max()), history.tokens.shape[1]),
        )
        found = matched > 0
        if found.device.type == "cpu" and not found.any():
            return None
        cells = self._cells(matched, ids, step, drafted)
        # Placeholders of images and embeddings are no tokens that could be drafted: a chain ends before them.
        real = ((ids >= 0) & (ids < self._vocab)).long().cumprod(1).bool()
        ids = ids.where(real, 0)
        chance = (self.right[cells] / self.tried[cells]).log()
        return Recalled(Chain(ids, chance.masked_fill(~(found[:, None] & real), float("-inf"))), cells, found)

    def _cells(
        self, matched: torch.Tensor, ids: torch.Tensor, step: Step, drafted: Candidates
    ) -> torch.Tensor:
        deepest = ids.shape[1]
        depth = torch.arange(1, deepest + 1, device=ids.device)
        says = torch.full_like(ids, PAST)
        near = min(deepest, drafted.ids.shape[1])
        same = drafted.ids[:, :near] == ids[:, :near, None]
        says[:, :near] = torch.where(same[:, :, 0], BEST, torch.where(same.any(2), AMONG, NONE))
        by_match, by_depth = torch.bucketize(matched, self._matches), torch.bucketize(depth, self._depths)
        sampled = step.sampled
        kind = torch.zeros_like(by_match) if sampled is None else sampled.long()
        a, b, c = self._strides
        return (kind * a + by_match * b)[:, None] + by_depth * c + says

    def learn(self, recalled: Recalled, accepted: Accepted) -> None:
        """Count what the target said where the chain foretold it.

        A token is judged where the target's is known, which is as far as the accepted path goes, and where
        all before it were right.
        """
        ids = recalled.chain.ids
        said = accepted.out_tokens[:, : ids.shape[1]]
        ids, cells = ids[:, : said.shape[1]], recalled.cells[:, : said.shape[1]]
        place = torch.arange(ids.shape[1], device=ids.device)
        right = said == ids
        before = torch.cat([right.new_ones(len(ids), 1), right[:, :-1]], 1).long().cumprod(1).bool()
        judged = before & (place < accepted.accept_lens[:, None]) & recalled.found[:, None]
        for counts, first, happened in (
            (self.tried, WORTH, judged),
            (self.right, self._first_right, judged & right),
        ):
            # Fade towards the first guess, never below it.
            counts.sub_(first).mul_(FADE).add_(first)
            counts.index_add_(0, cells.flatten(), happened.flatten().to(counts.dtype))
