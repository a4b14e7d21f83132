"""Prompts that SGLang would take and then die of, refused where requests come in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def validate_one_request(original: Callable, self: Any, obj: Any, input_ids: list[int] | None) -> Any:
    """AROUND ``TokenizerManager._validate_one_request``: no empty prompt and no unknown token id.

    SGLang 0.5.23 checks neither (of ids only those of ``token_ids_logprob``,
    ``managers/tokenizer_manager.py:1523``): an empty prompt beside others in a list ends the scheduler,
    and so does an id outside the vocabulary, in the embedding, where it is a device assert on CUDA.

    Raises:
        ValueError: SGLang's way to answer 400; the message names the cause.
    """
    # With images or embeddings the ids are placeholders that a processor expands; in a session they are
    # appended to a text that the scheduler has.
    if input_ids is not None and obj.input_embeds is None and not obj.contains_mm_input():
        may_be_empty = getattr(obj, "session_params", None) is not None
        check_ids(input_ids, self.model_config, may_be_empty)
    return original(self, obj, input_ids)


def check_ids(ids: list[int], config: Any, may_be_empty: bool = False) -> None:
    """Raise ValueError unless ``ids`` are of the model's vocabulary, and at least one."""
    if not ids:
        if may_be_empty:
            return
        raise ValueError("The prompt has no tokens; give at least one.")
    # A model with images may count another vocabulary than its text's.
    size = max(config.vocab_size, getattr(config.hf_text_config, "vocab_size", 0))
    least, greatest = min(ids), max(ids)
    if least < 0 or greatest >= size:
        wrong = least if least < 0 else greatest
        raise ValueError(
            f"The prompt's token id {wrong} is not in the vocabulary; valid ids are 0 to {size - 1}."
        )
