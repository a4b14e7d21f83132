"""Requests that another server has prefilled (prefill/decode disaggregation).

SGLang moves the drafter's K and V with the target's (``disaggregation/utils.py``, the draft pool's buffers
behind the target's) and hands over the last token (``speculative/dflash_disaggregation.py``). What is left
for us is the text so far: no prefill pass runs here that could note it.
"""

from __future__ import annotations

from typing import Any

PREBUILT = (
    "sglang.srt.disaggregation.decode_schedule_batch_mixin."
    "ScheduleBatchDisaggregationDecodeMixin.process_prebuilt"
)


class _Receiver:
    """The `Adjustments` of this process's worker; SGLang's batch does not know its worker."""

    adjust: Any = None


def receive(adjust: Any) -> None:
    """Note what transferred requests have said in this worker's history."""
    _Receiver.adjust = adjust


def remember_transferred(result: None, batch: Any, future_map: Any) -> None:
    """AFTER ``process_prebuilt``: each request's first token, or after a retraction its whole text."""
    if _Receiver.adjust is not None:
        _Receiver.adjust.note_texts(batch)
