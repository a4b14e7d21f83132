"""Torch twin of the recall, vectorised over requests; the product path on CPU."""

from __future__ import annotations

import torch

from dflash_kernels.recall import Recalled


def recall_torch(
    history: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    *,
    count: int,
    longest: int,
    min_match: int,
    max_match: int,
) -> Recalled:
    """Same contract as `dflash_kernels.recall`.

    All earlier ends are compared with the text's end at once, one token further back a pass. After
    `min_match` passes usually few are left, and those are compared to the end in one go; where many are (a
    text of one token), the passes go on.
    """
    rows, lengths = rows.long(), lengths.long()[:, None]
    bs, dev = rows.shape[0], history.device
    if longest < 2:  # nothing stands before a text's end
        none = torch.zeros((bs, count + 1), dtype=torch.int64, device=dev)
        return Recalled(none[:, 0].int(), none[:, 1:].contiguous())
    text = history[:, :longest].index_select(0, rows)
    back = lengths - 1 - torch.arange(max_match, device=dev)
    end = history[rows[:, None], back.clamp(min=0)].masked_fill_(back < 0, -1)  # no token is -1

    alive = torch.arange(longest, device=dev) < lengths - 1
    for j in range(min(min_match, longest)):
        _keep(alive, text, end, j)
    left = alive.nonzero()
    if len(left) * (max_match - min_match) <= alive.numel() // 4:
        matched, at = _compare_few(left, text, end, min_match)
    else:
        matched, at = _compare_all(alive, text, end, min_match)

    found = matched > 0
    period = (lengths - 1 - at).clamp(min=1)
    source = at + 1 + torch.arange(count, device=dev) % period
    ids = history[rows[:, None], source.clamp(max=history.shape[1] - 1)].long()
    return Recalled(matched[:, 0].int(), ids.masked_fill_(~found, 0))


def _keep(alive: torch.Tensor, text: torch.Tensor, end: torch.Tensor, j: int) -> None:
    """Clears the positions whose token j further back is not the end's."""
    alive[:, j:] &= text[:, : text.shape[1] - j] == end[:, j, None]
    alive[:, :j] = False


def _compare_few(
    left: torch.Tensor, text: torch.Tensor, end: torch.Tensor, min_match: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(length, position) of each text's best match, int64 [bs, 1], among `left` int64 [any, 2]."""
    (bs, longest), max_match = text.shape, end.shape[1]
    b, at = left.unbind(1)
    j = torch.arange(min_match, max_match, device=text.device)
    source = at[:, None] - j
    same = (text[b[:, None], source.clamp(min=0)] == end[b, min_match:]) & (source >= 0)
    matched = min_match + same.cumprod(1).sum(1)
    best = matched.new_zeros(bs).scatter_reduce_(0, b, matched * longest + at, "amax")[:, None]
    return best // longest, best % longest


def _compare_all(
    alive: torch.Tensor, text: torch.Tensor, end: torch.Tensor, min_match: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_compare_few`, among all that are alive."""
    ones = alive.view(torch.uint8)  # quicker to add and to reduce than booleans
    matched = ones * min_match
    for j in range(min_match, min(end.shape[1], text.shape[1])):
        _keep(alive, text, end, j)
        if not ones.amax():
            break
        matched += ones
    # The first maximum from behind: of the longest the last.
    at = text.shape[1] - 1 - matched.flip(1).argmax(1, keepdim=True)
    return matched.gather(1, at).long(), at
