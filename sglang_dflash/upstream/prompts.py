"""Prompts that SGLang would take and then die of, refused where requests come in."""

from __future__ import annotations

import re
from collections.abc import Callable, Sized
from typing import Any

import msgspec
import numpy as np
import torch
from sglang.srt.managers.embed_types import PositionalEmbeds
from sglang.srt.managers.io_struct import SessionParams
from sglang.srt.runtime_context import get_exec, get_spec
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

_INT32_MAX = 2**31 - 1
#: What a request can ask back that a pass over a tree does not give as SGLang reads it: rows are by node, or
#: by the slot that a node had before the accepted path was moved.
_NOT_OF_TREES = ("return_hidden_states", "return_sampling_mask", "return_routed_experts")


def validate_one_request(original: Callable, self: Any, obj: Any, input_ids: list[int] | None) -> Any:
    """AROUND ``TokenizerManager._validate_one_request``: no empty prompt, no unknown token id, no embeddings
    that are not the model's and no parameter of another type or range than the scheduler takes.

    SGLang 0.5.23 checks neither (of ids only those of ``token_ids_logprob``,
    ``managers/tokenizer_manager.py:1523``): an empty prompt beside others in a list ends the scheduler,
    and so does an id outside the vocabulary, in the embedding, where it is a device assert on CUDA.

    Raises:
        ValueError: SGLang's way to answer 400; the message names the cause.
    """
    check_parameters(obj, self.model_config)
    check_served(obj)
    in_session = getattr(obj, "session_params", None) is not None
    embeds = getattr(obj, "input_embeds", None)
    if embeds is not None:
        if in_session:
            raise ValueError("A session's prompt is text or token ids; it cannot take input_embeds.")
        check_embeds(embeds, self.model_config, self.context_len)
    # With images the ids are placeholders that a processor expands; in a session they are appended to a
    # text that the scheduler has.
    elif input_ids is not None and not obj.contains_mm_input():
        check_ids(input_ids, self.model_config, may_be_empty=in_session)
    return original(self, obj, input_ids)


def validate_inputs(original: Callable, self: Any) -> None:
    """AROUND ``GenerateReqInput._validate_inputs``: embeddings that hold something.

    SGLang looks at the first number of the first row to tell a prompt from a batch of them.

    Raises:
        ValueError: SGLang's way to answer 400; the message names the cause.
    """
    original(self)
    embeds = self.input_embeds
    if embeds is None or self.text is not None or self.input_ids is not None:
        return
    if not (_holds_something(embeds) and _holds_something(embeds[0])):
        raise ValueError(
            "input_embeds is empty; give a list of rows, one per token, or a list of such prompts."
        )


def _holds_something(values: Any) -> bool:
    return isinstance(values, Sized) and not isinstance(values, str) and len(values) > 0


def check_embeds(embeds: Any, config: Any, context_len: int) -> None:
    """Raise ValueError unless ``embeds`` is a prompt of rows as wide as the model, of numbers it can hold."""
    hidden = int(config.hidden_size)
    try:
        values = np.asarray(embeds, dtype=np.float64)
    except (ValueError, TypeError):
        values = np.empty(0)
    if values.ndim != 2 or values.shape[1] != hidden or not len(values):
        raise ValueError(f"input_embeds must be rows of {hidden} numbers each, the model's hidden size.")
    if len(values) >= context_len:
        raise ValueError(
            f"The input ({len(values)} embeddings) is longer than the model's context length "
            f"({context_len} tokens)."
        )
    # One NaN would stay in the KV cache, beyond its request.
    if not np.all(np.abs(values) <= torch.finfo(config.dtype).max):
        raise ValueError(f"input_embeds holds a number that is NaN or out of {config.dtype}'s range.")


def _trees_serve() -> bool:
    # Under SGLang's chain nothing of this module is installed.
    return get_spec().speculative_algorithm == "DFLASH"


def check_served(obj: Any) -> None:
    """Raise ValueError for what draft trees do not give back; SGLang would leave it out, or answer 500."""
    for name in _NOT_OF_TREES:
        if getattr(obj, name, None) and _trees_serve():
            raise ValueError(
                f"draft trees do not serve {name}; leave it out, or ask a server with "
                "SGLANG_DFLASH_MODE=chain or without a drafter."
            )


def check_parameters(obj: Any, config: Any) -> None:
    """Raise ValueError for what SGLang's HTTP layer lets through and its scheduler ends or trips on."""
    params = getattr(obj, "session_params", None)
    if params is not None:
        names = SessionParams.__struct_fields__
        unknown = params.keys() - set(names)
        if unknown:
            raise ValueError(
                f"session_params has no field {min(unknown)!r}; its fields are {', '.join(names)}."
            )
        try:
            msgspec.convert([params.get(name) for name in names], SessionParams)
        except msgspec.ValidationError as error:
            at = re.search(r" - at `\$\[(\d+)\]`", str(error))
            where, what = (names[int(at[1])], str(error)[: at.start()]) if at else ("", str(error))
            raise ValueError(f"session_params {where}: {what}.") from None
    overrides = getattr(obj, "positional_embed_overrides", None)
    if overrides is not None and not isinstance(overrides, PositionalEmbeds):
        raise ValueError("positional_embed_overrides cannot be sent over HTTP.")
    top = getattr(obj, "top_logprobs_num", None) or 0
    if top > config.vocab_size:
        raise ValueError(f"top_logprobs_num is {top}; the vocabulary has {config.vocab_size} tokens.")
    processor = getattr(obj, "custom_logit_processor", None)
    if processor and get_exec().features.enable_custom_logit_processor:
        try:
            CustomLogitProcessor.from_str(processor)
        except Exception as error:  # whatever its bytes hold
            raise ValueError(
                f"custom_logit_processor cannot be loaded ({type(error).__name__}: {error}); send what the "
                "class's to_str() gives."
            ) from None
    sampling = obj.sampling_params or {}
    custom = sampling.get("custom_params")
    if custom is not None and not isinstance(custom, dict):
        raise ValueError(f"custom_params is {custom!r}; it must be an object.")
    if (sampling.get("top_k") or 0) > _INT32_MAX:
        raise ValueError(f"top_k is {sampling['top_k']}; it must be at most {_INT32_MAX}, or -1 for all.")
    regexes = sampling.get("stop_regex") or []
    for regex in [regexes] if isinstance(regexes, str) else regexes:
        try:
            re.compile(regex)
        except re.error as error:
            raise ValueError(f"stop_regex {regex!r} is no regular expression: {error}.") from None


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
