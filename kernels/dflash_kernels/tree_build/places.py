"""Which places of a depth and which of their children can be in a tree, for the torch twin.

A node is in the tree only together with all nodes that come before it in the order. For rank k under the
parent in place p of its depth these are the p + 1 first of that depth, what is above them, and the k better
siblings. Where all parents rank the same children, the (p+1)(k+1)-1 children that dominate it are among them:
a better or equal place and a better or equal rank. So of W places and K ranks few pairs are left, fewer the
deeper they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

#: Rank of the chain's child.
CHAIN = -1


@dataclass(frozen=True)
class Level:
    """The children laid out for one depth, by (parent's place, rank).

    Attributes:
        place, column: int64 [C], and with a chain [C + 1], the last to write there what is not laid out. The
            column is the rank, and K for the chain's child.
        count: C.
        ranks: K.
        width: places kept of them.
        at: int64 [(P + 1) * (K + 1), 2], with a chain and P places above: for the place of the chain's node
            (P for none) and the rank of the candidate with the chain's token (K for none), the index of the
            chain's child and of that candidate; C for what is not laid out.
        kept: int64 [width], the place times K + 1.
    """

    place: torch.Tensor
    column: torch.Tensor
    count: int
    ranks: int
    width: int
    at: torch.Tensor
    kept: torch.Tensor


@dataclass(frozen=True)
class Layout:
    """All depths of a block; a node is one of F places, depth after depth.

    Attributes:
        place, rank: int64 [sum of C], the levels' children one after the other.
        entry: int64 [sum of C], depth of the parent times K plus rank.
        first_child: int64 [F], where the children laid out for the node's depth begin in there.
        first_above: int64 [F], the first node of the depth above; -1 for the root.
        above: int64 [F], depth - 1.
        leads: bool [F], the first place of its depth.
    """

    levels: tuple[Level, ...]
    place: torch.Tensor
    rank: torch.Tensor
    entry: torch.Tensor
    first_child: torch.Tensor
    first_above: torch.Tensor
    above: torch.Tensor
    leads: torch.Tensor


@lru_cache(maxsize=64)
def lay_places(
    W: int, L: int, K: int, device: torch.device | None = None, *, alike: bool = True, chain: bool = False
) -> Layout:
    """The layout of a tree of W nodes besides the root, over L <= W depths of K candidates.

    Args:
        alike: all parents rank the same children, and places go by score alone.
        chain: in front of each place's children stands one of rank -1, and of the chain's node's children
            one may be missing.
    """

    def possible(place: int, rank: int, depth: int) -> bool:
        if rank == CHAIN:  # nothing is known of its score
            return place + depth + 1 <= W
        better = (place + 1) * (rank + 1) if alike else rank + 1
        return place + depth + better <= (W + 1 if chain else W)

    def tensor(values: Sequence[int] | Sequence[tuple[int, int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    levels: list[Level] = []
    places: list[int] = []
    ranks: list[int] = []
    entries: list[int] = []
    first_child: list[int] = []
    first_above: list[int] = []
    above: list[int] = []
    width = 1
    for depth in range(L):  # of the parents
        pairs = [
            (p, k) for p in range(width) for k in range(CHAIN if chain else 0, K) if possible(p, k, depth)
        ]
        count, parents = len(pairs), width
        width = min(W - depth, count)
        first_above += [len(above) - parents if depth else -1] * width
        first_child += [len(places)] * width
        above += [depth] * width
        places += [p for p, _ in pairs]
        ranks += [k for _, k in pairs]
        entries += [depth * K + k for _, k in pairs]
        at: list[tuple[int, int]] = []
        if chain:
            index = {pair: i for i, pair in enumerate(pairs)}
            at = [
                (index.get((p, CHAIN), count), index.get((p, k), count))
                for p in range(parents + 1)
                for k in range(K + 1)
            ]
            pairs.append((0, CHAIN))
        levels.append(
            Level(
                place=tensor([p for p, _ in pairs]),
                column=tensor([K if k == CHAIN else k for _, k in pairs]),
                count=count,
                ranks=K,
                width=width,
                at=tensor(at),
                kept=tensor([p * (K + 1) for p in range(width)]),
            )
        )
    depths = tensor(above)
    return Layout(
        levels=tuple(levels),
        place=tensor(places),
        rank=tensor(ranks),
        entry=tensor(entries),
        first_child=tensor(first_child),
        first_above=tensor(first_above),
        above=depths,
        leads=depths.diff(prepend=tensor([-1])) > 0,
    )


def best_first(score: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` best of each row, equal ones in the order they stand in; all if there are fewer.

    Args:
        score: float32 [bs, C], none above zero.

    Returns:
        float32 and int64 [bs, min(count, C)], scores and indices.
    """
    if score.numel() < 1024:
        score, index = score.sort(dim=1, descending=True, stable=True)
        return score[:, :count], index[:, :count]
    # A stable sort of many rows costs several times as much as a selection by keys of its own. Scores are
    # at most zero, so smaller magnitudes are better.
    magnitude = score.view(torch.int32).bitwise_and(0x7FFFFFFF).long()
    key = (magnitude << 16) | torch.arange(score.shape[1], device=score.device)
    index = key.topk(min(count, score.shape[1]), dim=1, largest=False).values & 0xFFFF
    return score.gather(1, index), index
