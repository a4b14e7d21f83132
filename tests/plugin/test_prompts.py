"""Prompts that would end SGLang's scheduler are refused where requests come in."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor

from sglang_dflash.upstream import prompts
from sglang_dflash.upstream.prompts import validate_inputs, validate_one_request

CONFIG = SimpleNamespace(
    vocab_size=8, hf_text_config=SimpleNamespace(vocab_size=10), hidden_size=3, dtype=torch.float32
)
MANAGER = SimpleNamespace(model_config=CONFIG, context_len=5)
ROW = [0.5, -1.0, 2.0]


def request(images: bool = False, **fields: Any) -> SimpleNamespace:
    known = {"input_embeds": None, "session_params": None, "sampling_params": {}}
    return SimpleNamespace(contains_mm_input=lambda: images, **known | fields)


def validate(obj: SimpleNamespace, ids: list[int] | None) -> str:
    return validate_one_request(lambda manager, obj, ids: "upstream's answer", MANAGER, obj, ids)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([], "no tokens"),
        ([3, 10], "token id 10 is not in the vocabulary; valid ids are 0 to 9"),
        ([3, -1], "token id -1"),
    ],
)
def test_ids_refused(ids: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        validate(request(), ids)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("return_hidden_states", True),
        ("return_hidden_states", "last"),
        ("return_sampling_mask", True),
        ("return_routed_experts", True),
    ],
)
def test_what_trees_do_not_give_back(monkeypatch: pytest.MonkeyPatch, field: str, value: Any) -> None:
    serving = SimpleNamespace(speculative_algorithm="DFLASH")
    monkeypatch.setattr(prompts, "get_spec", lambda: serving)
    with pytest.raises(ValueError, match=f"draft trees do not serve {field}"):
        validate(request(**{field: value}), [1, 2])
    assert validate(request(**{field: False}), [1, 2]) == "upstream's answer"
    serving.speculative_algorithm = None
    assert validate(request(**{field: value}), [1, 2]) == "upstream's answer"


@pytest.mark.parametrize(
    ("embeds", "words"),
    [
        ([[0.5] * 10], "rows of 3 numbers"),
        ([ROW, ROW[:2]], "rows of 3 numbers"),
        (ROW, "rows of 3 numbers"),
        ([[]], "rows of 3 numbers"),
        ([], "rows of 3 numbers"),
        ([["a", "b", "c"]], "rows of 3 numbers"),
        ([[None] * 3], "NaN or out of"),
        ([[[0.5] * 3]], "rows of 3 numbers"),
        ([[0.5, float("nan"), 0.5]], "NaN or out of torch.float32's range"),
        ([[0.5, 1e39, 0.5]], "NaN or out of torch.float32's range"),
        ([[0.5, float("-inf"), 0.5]], "NaN or out of torch.float32's range"),
        ([ROW] * 5, "longer than the model's context length"),
    ],
)
def test_embeds_refused(embeds: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        validate(request(input_embeds=embeds), None)


def test_embeds_cannot_continue_a_session() -> None:
    with pytest.raises(ValueError, match="session's prompt is text or token ids"):
        validate(request(input_embeds=[ROW], session_params={"id": "a"}), None)


@pytest.mark.parametrize("embeds", [[], [[]], "", {}, 5, [5.0], ["x"]])
def test_embeds_that_hold_nothing_are_refused(embeds: Any) -> None:
    obj = SimpleNamespace(text=None, input_ids=None, input_embeds=embeds)
    with pytest.raises(ValueError, match="input_embeds is empty"):
        validate_inputs(lambda obj: None, obj)


@pytest.mark.parametrize("fields", [{"input_embeds": [ROW]}, {"input_embeds": [[ROW]]}, {"text": "a"}])
def test_inputs_passed_on(fields: dict[str, Any]) -> None:
    asked: list[Any] = []
    obj = SimpleNamespace(**{"text": None, "input_ids": None, "input_embeds": None} | fields)
    validate_inputs(asked.append, obj)
    assert asked == [obj]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"session_params": {"id": ["a"]}}, "session_params id: Expected `str | null`, got `array`."),
        ({"session_params": {"id": "a", "rid": {"b": 1}}}, "got `object`"),
        ({"session_params": {"id": "a", "offset": "1"}}, "session_params offset: Expected `int | null`"),
        ({"session_params": {"id": "a", "colour": 1}}, "session_params has no field 'colour'"),
        ({"top_logprobs_num": 9}, "top_logprobs_num is 9; the vocabulary has 8 tokens"),
        ({"positional_embed_overrides": [1]}, "positional_embed_overrides"),
        ({"sampling_params": {"top_k": 2**31}}, "top_k is 2147483648"),
        ({"sampling_params": {"custom_params": 7}}, "custom_params is 7; it must be an object"),
        ({"sampling_params": {"stop_regex": "("}}, "no regular expression"),
        ({"sampling_params": {"stop_regex": ["a", "*"]}}, "no regular expression"),
    ],
)
def test_parameters_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        validate(request(**fields), [3])


@pytest.mark.parametrize(
    ("obj", "ids"),
    [
        (request(), [0, 9]),
        (request(), None),
        (request(images=True), [999_999]),
        (request(input_embeds=[ROW] * 4), None),
        (request(input_embeds=[[1, 0, 3e38]]), None),
        (request(session_params={"id": "a"}), []),
        (request(session_params={"id": "a", "offset": 3, "replace": True}), [5]),
        (request(top_logprobs_num=8, sampling_params={"top_k": -1, "stop_regex": "a+"}), [5]),
        (request(sampling_params={"top_k": 2**31 - 1, "stop_regex": None}), [5]),
    ],
)
def test_passed_on(obj: SimpleNamespace, ids: list[int] | None) -> None:
    assert validate(obj, ids) == "upstream's answer"


def test_a_custom_logit_processor_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    features = SimpleNamespace(enable_custom_logit_processor=True)
    monkeypatch.setattr(prompts, "get_exec", lambda: SimpleNamespace(features=features))
    good = DisallowedTokensLogitsProcessor.to_str()
    assert validate(request(custom_logit_processor=good), [5]) == "upstream's answer"
    for bad in ("x", "{}", '{"callable": "00"}', '{"callable": 5}'):
        with pytest.raises(ValueError, match="custom_logit_processor cannot be loaded"):
            validate(request(custom_logit_processor=bad), [5])
