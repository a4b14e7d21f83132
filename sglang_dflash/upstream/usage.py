"""What SGLang counts of an answer, where a step's tokens went past the answer's end."""

from __future__ import annotations

from typing import Any


def trim_reasoning(processor: Any, req: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE ``SchedulerBatchResultProcessor._handle_finish_state_updated_req``: no reasoning past the end.

    SGLang 0.5.23 counts all tokens of the step in which a request ends
    (``scheduler_components/batch_result_processor.py:1048``) before it looks for the end. Reasoning stands
    at the front of an answer, so what was counted past the end is what is more than the answer has.
    """
    if req.finished_len is None or not req.reasoning_tokens:
        return
    end = req.finished_len
    opening = 0 if req.require_reasoning else len(processor.model_config.self_opened_think_start_ids or ())
    # The model's own opening tag counts once it is whole.
    req.reasoning_tokens = min(req.reasoning_tokens, end) if end >= opening else 0
