"""Custom logit processors of the tests; a server loads them by name."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.sampling.custom_logit_processor import (
    CustomLogitProcessor,
    DeepseekOCRNoRepeatNGramLogitProcessor,
    ThinkingBudgetLogitProcessor,
)


class WriteAt(CustomLogitProcessor):
    """Token 17 where the text has ``at`` tokens."""

    def __call__(self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None) -> Any:
        for row, params in enumerate(custom_param_list or []):
            if len(params["__req__"].output_ids) == params["at"]:
                logits[row] = -float("inf")
                logits[row, 17] = 0.0
        return logits


class WriteAtDeclared(WriteAt):
    follows_paths = True


class WriteAtHidden(CustomLogitProcessor):
    """Its code does not name the request."""

    def __call__(self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None) -> Any:
        for row, params in enumerate(custom_param_list or []):
            if len(params["__" + "req".lower() + "__"].output_ids) == params["at"]:
                logits[row] = -float("inf")
                logits[row, 17] = 0.0
        return logits


class Nth(CustomLogitProcessor):
    """Keeps state: its n-th call of a request forbids the best n tokens but one (n modulo 3)."""

    def __call__(self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None) -> Any:
        for row, params in enumerate(custom_param_list or []):
            req = params["__req__"]
            calls = getattr(req, "calls_of_test", 0)
            req.calls_of_test = calls + 1
            best = logits[row].topk(1 + calls % 3).indices
            logits[row, best[:-1]] = -float("inf")
        return logits


class Budget(ThinkingBudgetLogitProcessor):
    """SGLang's own, of the tiny model's tokens."""

    THINKING_START_TOKEN_ID = 60
    THINKING_END_TOKEN_ID = 62
    NEW_LINE_TOKEN_ID = 10


class NoRepeat(DeepseekOCRNoRepeatNGramLogitProcessor):
    pass


class Forbid(CustomLogitProcessor):
    """Does not look at the request."""

    def __call__(self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None) -> Any:
        for row, params in enumerate(custom_param_list or []):
            logits[row, params["at"]] = -float("inf")
        return logits
