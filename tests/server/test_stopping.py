"""Where an accepted path crosses the end of an answer, nothing past the end is emitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests import tiny
from tests.server.support import PINNED, Pair, Request, accept_length, body_of, visible, with_answer

pytestmark = pytest.mark.server

REQUESTS = [
    Request(tuple(tiny.tokens_of(text)), 48) for text in (b"one", b"two two", b"three", b"4", b"V ive")
]


@pytest.fixture(scope="module")
def answers(tiny_servers: Pair) -> list[list[int]]:
    """What plain decoding says when nothing stops it; the tree drafts this, past every stop."""
    replies = tiny_servers.plain.post_all([body_of(request, ignore_eos=True) for request in REQUESTS], 5)
    return [reply["output_ids"] for reply in replies]


def stopped(
    servers: Pair, answers: list[list[int]], params: Callable[[list[int]], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Compare with stops that ``params`` derives from each answer; the tree's replies."""
    bodies = [body_of(request, **params(answer)) for request, answer in zip(REQUESTS, answers, strict=True)]
    _, got = servers.compare(bodies, len(bodies), answers, at_least=0)
    for reply in got:
        assert passes(reply) <= most_passes(reply["meta_info"]["completion_tokens"])
    return got


def passes(reply: dict[str, Any]) -> int:
    return reply["meta_info"].get("spec_verify_ct", 0)


def most_passes(tokens: int) -> float:
    """At least three tokens a step, or no path was crossed; the first token is prefill's."""
    if PINNED != "fixed":
        return float("inf")  # at random widths passes say nothing
    return (tokens + 1) // 3


def first_new(answer: list[int], start: int) -> int:
    """The first position from ``start`` whose token did not occur before it."""
    return next(at for at in range(start, len(answer)) if answer[at] not in answer[:at])


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 8, 11])
def test_max_tokens_in_mid_path(limit: int, tiny_servers: Pair, answers: list[list[int]]) -> None:
    bodies = [body_of(replace(request, max_new_tokens=limit), ignore_eos=True) for request in REQUESTS]
    _, got = tiny_servers.compare(bodies, 5, answers, at_least=0)
    for reply, answer in zip(got, answers, strict=True):
        assert reply["output_ids"] == answer[:limit]
        assert reply["meta_info"]["completion_tokens"] == limit
        assert reply["meta_info"]["finish_reason"] == {"type": "length", "length": limit}
        assert passes(reply) <= most_passes(limit)


@pytest.mark.parametrize("start", [1, 2, 3, 4, 5])
def test_stop_token_ids(start: int, tiny_servers: Pair, answers: list[list[int]]) -> None:
    got = stopped(
        tiny_servers, answers, lambda answer: {"stop_token_ids": [answer[first_new(answer, start)], 499]}
    )
    for reply, answer in zip(got, answers, strict=True):
        at = first_new(answer, start)
        assert reply["output_ids"] == answer[: at + 1]
        assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": answer[at]}


@pytest.mark.parametrize("trim", [True, False])
def test_stop_strings_across_accepted_tokens(trim: bool, tiny_servers: Pair) -> None:
    """One token a letter, so every stop string spans tokens; the drafts go on behind it."""
    text = "one two three four five six seven"
    stops = ["e", "two", "three fo", "ur fi", "s"]
    bodies = [
        body_of(request, regex=text, stop=[stop, "never"], no_stop_trim=not trim)
        for request, stop in zip(REQUESTS, stops, strict=True)
    ]
    drafts = [tiny.tokens_of(text.encode())] * len(bodies)
    _, got = tiny_servers.compare(bodies, 5, drafts, at_least=0)
    for stop, reply in zip(stops, got, strict=True):
        end = text.index(stop) + len(stop)
        assert reply["text"] == (text[: end - len(stop)] if trim else text[:end])
        assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
        assert reply["meta_info"]["completion_tokens"] == end
        assert passes(reply) <= most_passes(end)


def test_eos_in_mid_path_and_ignore_eos(tiny_servers: Pair) -> None:
    """A bias makes the model end by itself; with ``ignore_eos`` it must go on."""
    checked = 0
    for bias in (6.0, 8.0, 10.0, 12.0):
        params = {"logit_bias": {str(tiny.EOS_ID): bias}}
        on = [body_of(request, ignore_eos=True, **params) for request in REQUESTS]
        endless, _ = tiny_servers.compare(on, 5)
        drafts = [reply["output_ids"] for reply in endless]
        assert all(len(draft) == 48 for draft in drafts)
        off = [body_of(request, **params) for request in REQUESTS]
        _, got = tiny_servers.compare(off, 5, drafts, at_least=0)
        for reply, draft in zip(got, drafts, strict=True):
            if tiny.EOS_ID not in draft[:44]:
                continue
            end = draft.index(tiny.EOS_ID) + 1
            assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": tiny.EOS_ID}
            assert reply["output_ids"] == draft[:end]
            checked += end % 5 != 1 and end > 2
    assert checked >= 4


def test_the_first_stop_of_a_path_wins(tiny_servers: Pair, answers: list[list[int]]) -> None:
    """A stop token, the limit and more drafted tokens within one step."""
    answer = answers[0]
    at = first_new(answer, 6)
    for limit in (at, at + 1, at + 2):
        body = body_of(replace(REQUESTS[0], max_new_tokens=limit), stop_token_ids=[answer[at]])
        want = tiny_servers.plain.post(**body)
        got = tiny_servers.tree.post(**with_answer(body, answer))
        assert visible(got) == visible(want)
        assert got["meta_info"]["finish_reason"]["type"] == ("length" if limit <= at else "stop")
        assert accept_length([got]) > 2
