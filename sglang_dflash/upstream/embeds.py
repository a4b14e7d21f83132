"""Prompts given as embeddings, beside others in one prefill batch."""

from __future__ import annotations

from typing import Any

import torch


def spread_embeds(result: None, batch: Any) -> None:
    """AFTER ``ScheduleBatch.prepare_for_extend``: embeddings go to the rows they stand for.

    SGLang 0.5.23 hands the model the embeddings of those requests that brought some in the place of all
    rows (``managers/schedule_batch.py:3075``), so a request with embeddings and one without in one prefill
    batch end the scheduler, and it casts them to bfloat16. As replacements of single rows, which the model
    runner knows too, they take the model's dtype and leave the other requests' rows alone.
    """
    if batch.input_embeds is None:
        return
    rows, start = [], 0
    for req, width in zip(batch.reqs, batch.extend_lens, strict=True):
        if req.input_embeds is not None:
            rows.append(torch.arange(start, start + width))
        start += width
    positions = torch.cat(rows).to(batch.device)
    embeds, batch.input_embeds = batch.input_embeds, None
    if batch.replace_embeds is not None:
        # What a request overrides comes last and wins.
        embeds = torch.cat([embeds, batch.replace_embeds.to(embeds.dtype)])
        positions = torch.cat([positions, batch.replace_positions])
    batch.replace_embeds, batch.replace_positions = embeds, positions
