"""Each request's committed tokens, on the device, by request row and position.

The host's own list lags by the step in flight under overlap scheduling, so what a penalty must
count is kept where it is produced.
"""

from __future__ import annotations

import torch


class TokenHistory:
    """Token ids by (request row, position). Prompt positions are never written nor read.

    Args:
        rows: rows of SGLang's ``req_to_token``.
        columns: its columns (context length plus headroom).
    """

    def __init__(self, rows: int, columns: int, device: torch.device | str) -> None:
        self.tokens = torch.zeros((rows, columns), dtype=torch.int32, device=device)

    def write(self, rows: torch.Tensor, start: torch.Tensor, tokens: torch.Tensor) -> None:
        """Put ``tokens`` int64 [bs, W] at positions start .. start + W - 1 of each row.

        Columns beyond what a step accepted hold anything; later steps overwrite them before they
        can be read.
        """
        columns = start[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        columns = columns.clamp(max=self.tokens.shape[1] - 1)
        self.tokens[rows[:, None], columns] = tokens.int()

    def tail(self, rows: torch.Tensor, last: torch.Tensor, width: int) -> torch.Tensor:
        """int32 [bs, width]: the tokens at positions last - width + 1 .. last (int64 [bs]) of each row."""
        columns = last[:, None] - torch.arange(width - 1, -1, -1, device=last.device)
        return self.tokens[rows[:, None], columns.clamp(min=0)]

    def counts(
        self, rows: torch.Tensor, first: torch.Tensor, last: torch.Tensor, longest: int, vocab: int
    ) -> torch.Tensor:
        """How often each token stands at positions first .. last (inclusive) of each row.

        Args:
            rows, first, last: int [bs].
            longest: an upper bound of ``last + 1``, known to the host.

        Returns:
            float32 [bs, vocab].
        """
        positions = torch.arange(longest, device=rows.device)
        valid = (positions >= first[:, None]) & (positions <= last[:, None])
        ids = self.tokens[rows, :longest].long().clamp(0, vocab - 1)
        return torch.zeros((rows.shape[0], vocab), device=rows.device).scatter_add_(1, ids, valid.float())
