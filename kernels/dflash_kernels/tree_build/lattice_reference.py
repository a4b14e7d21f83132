"""Torch twin of the search where a parent ranks its own children or a chain runs beside them.

As in `reference.py` a depth's children are laid out by (parent's place, rank), and equal ones keep that
order. The chain's child is laid out in front of each place's children and exists at one of them. Which
candidates are the chain's tokens, and what its nodes score, is known before the search.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.nn.functional import pad

from dflash_kernels.tree_build import Chain
from dflash_kernels.tree_build.places import CHAIN, Level, best_first, lay_places
from dflash_kernels.tree_build.reference import Nodes, gain_of

_NEVER = float("-inf")
_LOWEST = torch.finfo(torch.float32).min


def search_lattice(
    logprobs: torch.Tensor,
    ids: torch.Tensor,
    bonus: torch.Tensor | None,
    edges: torch.Tensor | None,
    chain: Chain | None,
    W: int,
    *,
    force_spine: bool,
) -> tuple[torch.Tensor, Nodes]:
    """The best nodes of each depth of the block, then the chain's beyond it.

    Args:
        logprobs, ids: float32 and int64 [bs, L <= W, K].
        bonus: float32 [L, 1] or None.
        edges: float32 [bs, L, K, K] or None.
        force_spine: the spine's node has the first place of its depth, whatever its score.

    Returns:
        Tokens int64 [bs, any] and the nodes that name them.
    """
    bs, L, K = ids.shape
    dev = ids.device
    # A forced node's place says nothing of its score.
    layout = lay_places(W, L, K, dev, alike=edges is None and not force_spine, chain=chain is not None)
    rows = _Rows.of(logprobs, bonus, edges, chained=chain is not None)
    recalled = None if chain is None else _Recalled.of(chain, ids, rows, W)

    score = logprobs.new_zeros(bs, 1)
    row = chain_at = torch.zeros((bs, 1), dtype=torch.int64, device=dev)  # times K + 1
    scores, picks, candidates = [score[:, :0]], [row[:, :0]], [row[:, :0]]
    for d, level in enumerate(layout.levels):
        child = score.index_select(1, level.place)
        if rows.candidate is None:
            child = child + rows.gain[:, d].index_select(1, level.column)
        else:
            entry = row.index_select(1, level.place) + level.column
            child = child + rows.gain[:, d].gather(1, entry)
        if recalled is not None:
            at = level.at.index_select(0, (chain_at + recalled.rank[:, d, None])[:, 0])
            child.scatter_(1, at, recalled.instead[:, d])
            child = child[:, : level.count]
        if force_spine:
            key = _heir_first(child, level, None if recalled is None else (at, recalled.exists[:, d]))
            pick = key.sort(dim=1, descending=True, stable=True).indices[:, : level.width]
            score = child.gather(1, pick)
        else:
            score, pick = best_first(child, level.width)
        scores.append(score)
        picks.append(pick)
        if rows.candidate is not None:
            row = rows.candidate[:, d].gather(1, entry.gather(1, pick))
            candidates.append(row)
        if recalled is not None:
            kept = pick == at[:, :1]
            chain_at = torch.where(kept, level.kept, level.width * (K + 1)).amin(1, keepdim=True)
            if rows.candidate is not None:
                row = torch.where(kept, recalled.row[:, d, None], row)

    child = torch.cat(picks, 1) + layout.first_child
    rank = layout.rank[child]
    candidate = rank if rows.candidate is None else torch.cat(candidates, 1) // (K + 1)
    nodes = Nodes(
        score=torch.cat(scores, 1),
        up=layout.place[child] + layout.first_above,
        token=layout.above * K + candidate,
        above=layout.above,
        spine=layout.leads if force_spine else None,
        depths=L,
    )
    if recalled is None:
        return ids.flatten(1), nodes
    nodes.token = torch.where(rank == CHAIN, L * K + layout.above, nodes.token)
    # The chain's node in the block's last depth; the root where there is no block.
    place, width = chain_at // (K + 1), layout.levels[-1].width if L else 1
    last = (nodes.score.shape[1] - width + place) if L else place - 1
    nodes = _with_chain(nodes, recalled, last, place == width, L * K)
    return torch.cat([ids.flatten(1), recalled.ids], 1), nodes


def _with_chain(
    nodes: Nodes, recalled: _Recalled, last: torch.Tensor, lost: torch.Tensor, token: int
) -> Nodes:
    """The block's nodes and the chain's beyond them, one a depth.

    Args:
        last: int64 [bs, 1], the chain's node in the block's last depth.
        lost: bool [bs, 1], that it has none there.
        token: index of the chain's first token.
    """
    L, D = nodes.depths, recalled.ids.shape[1]
    bs, F = nodes.score.shape
    above = torch.arange(L, D, device=last.device)
    beyond = (above - L).expand(bs, -1)
    return Nodes(
        score=torch.cat([nodes.score, recalled.score[:, L:].masked_fill(lost, _NEVER)], 1),
        up=torch.cat([nodes.up, torch.where(beyond == 0, last, F - 1 + beyond)], 1),
        token=torch.cat([nodes.token, token + L + beyond], 1),
        above=torch.cat([nodes.above, above]),
        spine=None if nodes.spine is None else pad(nodes.spine, (0, D - L)),
        depths=D,
    )


def _heir_first(
    child: torch.Tensor, level: Level, chain: tuple[torch.Tensor, torch.Tensor] | None
) -> torch.Tensor:
    """The children's scores, with +inf for the best child of the first place.

    Args:
        chain: int64 and bool [bs, 2], the chain's child and its duplicate, and whether they exist.
    """
    exists = (level.column < level.ranks).expand(len(child), -1)
    if chain is not None:
        exists = exists.scatter(1, *chain)
    exists = (exists & (level.place == 0))[:, : child.shape[1]]
    # A child of probability zero is better than none.
    best = torch.where(exists, child.clamp(min=_LOWEST), _NEVER).argmax(1, keepdim=True)
    return child.scatter(1, best, float("inf"))


@dataclass
class _Rows:
    """What the children of a parent gain: rows of K + 1, the last -inf for a child that is not there.

    Attributes:
        gain: float32 [bs, L, K + 1] by rank, or with edges [bs, L, R * (K + 1)] by the parent's row and rank.
        candidate: with edges, int64 of that shape: which candidate has that rank, times K + 1.
    """

    gain: torch.Tensor
    candidate: torch.Tensor | None

    @classmethod
    def of(
        cls, logprobs: torch.Tensor, bonus: torch.Tensor | None, edges: torch.Tensor | None, *, chained: bool
    ) -> _Rows:
        K = logprobs.shape[2]
        if edges is None:
            return cls(pad(gain_of(logprobs, bonus).cummin(dim=2).values, (0, 1), value=_NEVER), None)
        if chained:  # row K: below a token that is no candidate
            edges = torch.cat([edges, logprobs[:, :, None]], 2)
        edges = torch.where(edges.isnan(), _NEVER, edges)
        edges, candidate = edges.sort(dim=3, descending=True, stable=True)
        gain = pad(gain_of(edges, None if bonus is None else bonus[:, None]), (0, 1), value=_NEVER)
        return cls(gain.flatten(2), pad(candidate * (K + 1), (0, 1)).flatten(2))


@dataclass
class _Recalled:
    """The chain by depth, cut to W and padded to the block's L.

    Attributes:
        ids: int64 [bs, D].
        score: float32 [bs, D], of its nodes; -inf where it is over.
        row: int64 [bs, L], the candidate with the chain's token, K for none, times K + 1.
        rank: int64 [bs, L], that candidate's rank under the chain's node above; K for none.
        instead: float32 [bs, L, 2], scores of the chain's node and of that candidate.
        exists: bool [bs, L, 2], whether the chain is not over, and false for the candidate.
    """

    ids: torch.Tensor
    score: torch.Tensor
    row: torch.Tensor
    rank: torch.Tensor
    instead: torch.Tensor
    exists: torch.Tensor

    @classmethod
    def of(cls, chain: Chain, ids: torch.Tensor, rows: _Rows, W: int) -> _Recalled:
        bs, L, K = ids.shape
        short = (0, max(L - chain.ids.shape[1], 0))
        token = pad(chain.ids.long()[:, :W], short)
        gain = pad(gain_of(chain.logprobs.float()[:, :W]), short, value=_NEVER)
        goes_on = (gain == _NEVER).cumsum(1) == 0
        # Added one by one from the root down, as every other score.
        score = gain.masked_fill(~goes_on, _NEVER)
        if score.shape[1]:
            score = torch.stack(list(accumulate(score.unbind(1))), 1)
        same = _first((ids == token[:, :L, None]) & goes_on[:, :L, None])
        rank = same
        if rows.candidate is not None and L:
            above = pad(same[:, :-1], (1, 0))  # the root's row is 0
            row = rows.candidate.view(bs, L, K + 1, K + 1)
            row = row.gather(2, above[:, :, None, None].expand(-1, -1, 1, K + 1))[:, :, 0, :K]
            rank = _first(row == same[:, :, None] * (K + 1))
        instead = torch.stack([score[:, :L], torch.full_like(score[:, :L], _NEVER)], 2)
        exists = torch.stack([goes_on[:, :L], torch.zeros_like(goes_on[:, :L])], 2)
        return cls(token, score, same * (K + 1), rank, instead, exists)


def _first(found: torch.Tensor) -> torch.Tensor:
    """int64 [bs, L], index of the first true of the last dimension, its length for none."""
    size = found.shape[2]
    index = torch.arange(size + 1, device=found.device)
    return torch.where(pad(found, (0, 1), value=True), index, size).amin(2)
