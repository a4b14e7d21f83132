"""Input embeddings in the model's own dtype."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def in_own_dtype(extend_forward_kwargs: Callable) -> Callable:
    """``ModelRunner._extend_forward_kwargs``, unbound, without its cast of embeddings to bfloat16.

    SGLang 0.5.23 casts them whatever the model's dtype (``model_executor/model_runner.py:1772``), which
    ends float32 and float16 models: prompts given as embeddings, and the drafter's block, in eager mode.
    """

    @functools.wraps(extend_forward_kwargs)
    def kwargs_of(self: Any, forward_batch: Any, pp_proxy_tensors: Any) -> dict[str, Any]:
        kwargs = extend_forward_kwargs(self, forward_batch, pp_proxy_tensors)
        given = forward_batch.input_embeds
        if given is None or kwargs["input_embeds"].dtype == self.dtype:
            return kwargs
        embeds = given.to(self.dtype)
        positions = forward_batch.replace_positions
        if forward_batch.replace_embeds is not None and positions is not None:
            embeds = embeds.clone()
            embeds[positions] = forward_batch.replace_embeds.to(self.dtype)
        return kwargs | {"input_embeds": embeds}

    return kwargs_of
