"""What followed the end of a text when it stood there before (prompt lookup, suffix decoding)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dflash_kernels._dispatch import use_triton

#: Longest match that is looked for at most.
MAX_MATCH = 127


class Recalled(NamedTuple):
    """Attributes:
    matched: int32 [bs], tokens of the text's end that stand there earlier too; 0 for none.
    ids: int64 [bs, D], what followed there; 0 where nothing matched.
    """

    matched: torch.Tensor
    ids: torch.Tensor


def recall(
    history: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    *,
    count: int,
    longest: int,
    min_match: int = 3,
    max_match: int = 32,
) -> Recalled:
    """Finds the longest earlier match of each text's end and continues as it went on there.

    With t the text and n its length, a match of m tokens at e < n - 1 says t[e-m+1..e] = t[n-m..n-1]. Of all
    e the one with the largest m counts, m counted up to `max_match`, and of equal ones the last. The
    continuation is t[e+1], t[e+2], ...; where it reaches the text's end it goes on with itself (its first
    token being t[n]), so it has `count` tokens whatever follows e, and a text that repeats itself goes on
    repeating.

    Time grows with `longest` times `max_match` at worst and never with what the texts hold otherwise.

    Args:
        history: int32 [R, C], token ids >= 0 by text and position. What stands beyond a text's length is
            never used.
        rows: int [bs], each text's row.
        lengths: int64 [bs], tokens of each text, 0..longest.
        count: D, tokens to continue with.
        longest: an upper bound of `lengths` known to the host, at most C.
        min_match, max_match: shortest and longest match, 1 <= min_match <= max_match <= 127.

    Raises:
        ValueError: shapes do not fit, or a number is outside its range.
    """
    if history.ndim != 2 or rows.ndim != 1 or rows.shape != lengths.shape:
        raise ValueError(
            f"history {tuple(history.shape)} must be [R, C], rows {tuple(rows.shape)} and lengths "
            f"{tuple(lengths.shape)} both [bs]"
        )
    if not 1 <= min_match <= max_match <= MAX_MATCH:
        raise ValueError(
            f"matches must be 1 <= min_match <= max_match <= {MAX_MATCH}, not {min_match}..{max_match}"
        )
    if not 0 <= longest <= history.shape[1]:
        raise ValueError(f"longest must be 0..{history.shape[1]}, the history's columns, not {longest}")
    if count < 0:
        raise ValueError(f"count must not be negative, not {count}")
    if use_triton(history):
        from dflash_kernels.recall.kernel import recall_triton as impl
    else:
        from dflash_kernels.recall.reference import recall_torch as impl
    return impl(
        history, rows, lengths, count=count, longest=longest, min_match=min_match, max_match=max_match
    )
