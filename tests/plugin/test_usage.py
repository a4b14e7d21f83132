"""What is counted of an answer that ends within a step's tokens."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.schedule_batch import Req

from sglang_dflash.upstream.usage import trim_reasoning

START, END = [7, 8], [9, 7]


def fresh(require: bool) -> SimpleNamespace:
    return SimpleNamespace(
        require_reasoning=require,
        reasoning_tokens=0,
        finished_len=None,
        _is_reasoning_over=False,
        _think_end_matcher=None,
        _think_end_match_len=0,
        _think_start_match_len=0,
    )


def count(req: Any, tokens: list[int]) -> None:
    req.update_reasoning_tokens = lambda ids, end: Req.update_reasoning_tokens(req, ids, end)
    if req.require_reasoning:
        req.update_reasoning_tokens(tokens, END)
    else:
        Req.update_self_opened_reasoning_tokens(req, tokens, START, END)


@pytest.mark.parametrize("require", [True, False])
def test_reasoning_tokens_are_those_of_plain_decoding(require: bool) -> None:
    """Steps of up to five tokens, the last one cut, against one token at a time."""
    processor = SimpleNamespace(model_config=SimpleNamespace(self_opened_think_start_ids=START))
    cut = 0
    for seed in range(300):
        draw = random.Random(seed)
        text = [draw.choice([7, 8, 9, 1]) for _ in range(draw.randrange(1, 14))]
        if draw.random() < 0.7:
            text[:2] = START
        plain, tree = fresh(require), fresh(require)
        for token in text:
            count(plain, [token])
        past = text + [draw.choice([7, 8, 9, 1]) for _ in range(draw.randrange(5))]
        at = 0
        while at < len(past):
            width = len(past) - at if at + 5 >= len(past) else draw.randrange(1, 6)
            count(tree, past[at : at + width])
            at += width
        tree.finished_len = len(text)
        cut += tree.reasoning_tokens != plain.reasoning_tokens
        trim_reasoning(processor, tree, None)
        assert tree.reasoning_tokens == plain.reasoning_tokens, seed
    assert cut > 20
