"""Grammars on trees, with overlap: nodes that leave the grammar are masked before acceptance."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests import tiny
from tests.server.support import Pair, Request, accept_length, body_of, with_answer

pytestmark = pytest.mark.server

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Rome", "Oslo", "Lima"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "bb"]}, "minItems": 2, "maxItems": 3},
    },
    "required": ["city", "days", "tags"],
    "additionalProperties": False,
}
PHONE = r"[0-9]{3}-[0-9]{4}( ext [0-9]{2})?"
EBNF = 'root ::= "yes because " word " " word "."\nword ::= [a-z] [a-z] [a-z] [a-z]'
# JSON allows any whitespace between its parts, and a random model would write little else.
BLANKS = {str(token): -100.0 for token in tiny.tokens_of(b" \n\t\r")}
GRAMMARS: dict[str, dict[str, Any]] = {
    "json_schema": {"json_schema": json.dumps(SCHEMA), "logit_bias": BLANKS},
    "regex": {"regex": PHONE},
    "ebnf": {"ebnf": EBNF},
}
PROMPTS = [
    Request(tuple(tiny.tokens_of(text)), 80) for text in (b"Plan a trip.", b"Call me", b"Is it?", b"Why not")
]


def fits(kind: str, text: str) -> bool:
    if kind == "json_schema":
        found = json.loads(text)
        return found["city"] in ("Rome", "Oslo", "Lima") and 1 <= found["days"] <= 99 and len(found) == 3
    return bool(re.fullmatch({"regex": PHONE, "ebnf": r"yes because [a-z]{4} [a-z]{4}\."}[kind], text))


@pytest.mark.parametrize("batch", [1, 5])
def test_every_kind_of_grammar(batch: int, tiny_servers: Pair) -> None:
    kinds = [kind for kind in GRAMMARS for _ in PROMPTS]
    bodies = [body_of(request, **GRAMMARS[kind]) for kind in GRAMMARS for request in PROMPTS]
    want, _ = tiny_servers.compare(bodies, batch)
    for kind, reply in zip(kinds, want, strict=True):
        assert fits(kind, reply["text"]), (kind, reply["text"])


def test_grammars_and_free_text_in_one_batch(tiny_servers: Pair) -> None:
    free = [body_of(request) for request in PROMPTS]
    bound = [body_of(request, **GRAMMARS[kind]) for request, kind in zip(PROMPTS, GRAMMARS, strict=False)]
    mixed = [body for pair in zip(free, bound, strict=False) for body in pair] + free[len(bound) :]
    want, _ = tiny_servers.compare(mixed, len(mixed))
    texts = [reply["text"] for reply in want]
    assert not any(
        fits(kind, text) for kind, text in zip(GRAMMARS, texts[0::2], strict=False) if kind != "json_schema"
    )
    assert all(fits(kind, text) for kind, text in zip(GRAMMARS, texts[1::2], strict=False))


def test_drafts_outside_the_grammar_are_not_accepted(tiny_servers: Pair) -> None:
    """The tree is told what plain decoding says without the grammar, which is not what it may say."""
    free = tiny_servers.plain.post_all([body_of(request) for request in PROMPTS], 4)
    bodies = [body_of(request, regex=PHONE) for request in PROMPTS]
    _, got = tiny_servers.compare(bodies, 4, answers=[reply["output_ids"] for reply in free], at_least=0.9)
    assert all(fits("regex", reply["text"]) for reply in got)


def test_a_grammar_that_ends_in_mid_path(tiny_servers: Pair) -> None:
    """Drafts go on past the grammar's end; nothing of them may be emitted."""
    body = body_of(PROMPTS[0], regex="[0-9]{7}")
    (want,) = tiny_servers.plain.post_all([body], 1)
    longer = [*want["output_ids"], *want["output_ids"]]
    (got,) = tiny_servers.tree.post_all([with_answer(body, longer)], 1)
    assert got["output_ids"] == want["output_ids"]
    assert got["meta_info"]["finish_reason"] == want["meta_info"]["finish_reason"]
    assert accept_length([got]) > 2


TOOL = {
    "type": "function",
    "function": {
        "name": "book",
        "strict": True,
        "parameters": SCHEMA,
    },
}


def test_a_required_tool_call_over_the_chat_route(tiny_servers: Pair) -> None:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Book a trip."}],
        "tools": [TOOL],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_tokens": 120,
        "logit_bias": BLANKS,
        "logprobs": True,
    }
    calls, answer = [], []
    for client, more in (
        (tiny_servers.plain, {}),
        (tiny_servers.tree, {"custom_params": {"answer": answer}}),
    ):
        reply = client.http.post("/v1/chat/completions", json=body | more)
        assert reply.status_code == 200, reply.text
        (choice,) = reply.json()["choices"]
        (call,) = choice["message"]["tool_calls"]
        calls.append((call["function"], choice["finish_reason"], reply.json()["usage"]["completion_tokens"]))
        answer += tiny.tokens_of(
            bytes(byte for item in choice["logprobs"]["content"] for byte in item["bytes"])
        )
    assert calls[0] == calls[1]
    assert calls[0][0]["name"] == "book"
    assert fits("json_schema", calls[0][0]["arguments"])
