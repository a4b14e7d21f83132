"""Prompts that would end SGLang's scheduler are refused where requests come in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_dflash.upstream.prompts import validate_one_request

MANAGER = SimpleNamespace(
    model_config=SimpleNamespace(vocab_size=8, hf_text_config=SimpleNamespace(vocab_size=10))
)


def request(images: bool = False, embeds: Any = None, session: Any = None) -> SimpleNamespace:
    return SimpleNamespace(input_embeds=embeds, contains_mm_input=lambda: images, session_params=session)


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
def test_refused(ids: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        validate(request(), ids)


@pytest.mark.parametrize(
    ("obj", "ids"),
    [
        (request(), [0, 9]),
        (request(), None),
        (request(images=True), [999_999]),
        (request(embeds=[[0.5]]), []),
        (request(session={"id": "a"}), []),
    ],
)
def test_passed_on(obj: SimpleNamespace, ids: list[int] | None) -> None:
    assert validate(obj, ids) == "upstream's answer"
