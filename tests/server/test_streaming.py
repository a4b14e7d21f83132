"""Streaming through the ``openai`` client: chunks in order, none lost or doubled."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests import tiny
from tests.server.support import Client, Pair

pytestmark = pytest.mark.server

TEXT = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu"
WORDS = TEXT.split()


def connect(client: Client) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{client.server.url}/v1", api_key="none", max_retries=0)


def text_of(shift: int) -> str:
    return " ".join(WORDS[shift:] + WORDS[:shift])


def asked(shift: int, **more: Any) -> dict[str, Any]:
    """Every request its own text, so that a chunk of another's would show."""
    text = text_of(shift)
    extra = {"regex": text, "custom_params": {"answer": tiny.tokens_of(text.encode())}}
    return {"model": "tiny", "temperature": 0, "max_tokens": 100, "extra_body": extra} | more


def chat(client: openai.OpenAI, shift: int, **more: Any) -> Any:
    return client.chat.completions.create(
        messages=[{"role": "user", "content": "Go on."}], **asked(shift, **more)
    )


def complete(client: openai.OpenAI, shift: int, **more: Any) -> Any:
    return client.completions.create(prompt="Go on:", **asked(shift, **more))


STREAM = {"stream": True, "stream_options": {"include_usage": True}}


def pieces(chunks: Iterator[Any]) -> tuple[list[str], list[str], Any]:
    """The texts of a stream's chunks, its finish reasons and its usage."""
    texts, reasons, usage = [], [], None
    for chunk in chunks:
        for choice in chunk.choices:
            delta = choice.delta.content if hasattr(choice, "delta") else choice.text
            texts += [delta] if delta else []
            reasons += [choice.finish_reason] if choice.finish_reason else []
        usage = chunk.usage or usage
    return texts, reasons, usage


@pytest.mark.parametrize("route", [chat, complete])
def test_a_stream_is_the_answer_in_pieces(route: Any, tiny_servers: Pair) -> None:
    plain, tree = connect(tiny_servers.plain), connect(tiny_servers.tree)
    shifts = range(8)
    with ThreadPoolExecutor(len(shifts)) as pool:
        whole = list(pool.map(lambda shift: route(tree, shift), shifts))
        streams = list(pool.map(lambda shift: pieces(route(tree, shift, **STREAM)), shifts))
    for shift, reply, (texts, reasons, usage) in zip(shifts, whole, streams, strict=True):
        (choice,) = reply.choices
        said = choice.message.content if hasattr(choice, "message") else choice.text
        assert "".join(texts) == said == text_of(shift)
        # Several tokens a step: fewer chunks than tokens, but still a stream.
        assert 3 < len(texts) < len(TEXT)
        assert reasons == [choice.finish_reason]
        assert usage == reply.usage
        assert usage.completion_tokens == len(TEXT) + 1  # the grammar ends with EOS
    want = route(plain, 0)
    assert want.usage == whole[0].usage
    assert want.choices[0].finish_reason == whole[0].choices[0].finish_reason


@pytest.mark.parametrize("stop", ["gamma", "elta eps", "a"])
def test_a_stop_string_is_never_streamed(stop: str, tiny_servers: Pair) -> None:
    texts, reasons, usage = pieces(chat(connect(tiny_servers.tree), 0, stop=[stop], **STREAM))
    assert "".join(texts) == TEXT[: TEXT.index(stop)]
    assert reasons == ["stop"]
    assert usage.completion_tokens == TEXT.index(stop) + len(stop)


def test_logprobs_come_with_their_chunks(tiny_servers: Pair) -> None:
    more = {"logprobs": True, "top_logprobs": 2}
    whole = chat(connect(tiny_servers.tree), 3, **more).choices[0].logprobs.content
    streamed = [
        entry
        for chunk in chat(connect(tiny_servers.tree), 3, stream=True, **more)
        for choice in chunk.choices
        if choice.logprobs
        for entry in choice.logprobs.content
    ]
    assert [entry.token for entry in streamed] == [*text_of(3), "<eos>"]
    for left, right in zip(whole, streamed, strict=True):
        assert left.logprob == pytest.approx(right.logprob, abs=1e-5)
        assert [top.token for top in left.top_logprobs] == [top.token for top in right.top_logprobs]
