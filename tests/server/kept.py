"""Two turns of one text, by whatever keeps the first turn's cache for the second."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tests.server.support import Client, Request, body_of, with_answer
from tests.server.watch import load, until

NEXT = 12


@dataclass(frozen=True)
class Turns:
    """Token ids of both answers; ``want`` is plain decoding's second one, of the same ids sent fresh.

    ``cached`` counts the tokens that the second turn did not compute; ``reply`` is its whole reply.
    """

    first: list[int]
    second: list[int]
    want: list[int]
    cached: int
    reply: dict[str, Any]


#: (tree server, plain server, first turn's request, its long answer, its tokens, ids behind it).
Keeper = Callable[[Client, Client, Request, list[int], int, Sequence[int]], Turns]


def turn(client: Client, request: Request, draft: Sequence[int], **more: Any) -> dict[str, Any]:
    return client.post(**with_answer(body_of(request, ignore_eos=True), draft), **more)


def _finish(
    tree: Client, plain: Client, text: Sequence[int], said: list[int], new: Sequence[int] | None, **more: Any
) -> Turns:
    """The second turn: ``text`` whole where ``new`` is None, else ``new`` alone, as a session takes it."""
    whole = Request(tuple(text), NEXT)
    want = plain.generate([whole], 1, ignore_eos=True)[0]["output_ids"]
    reply = turn(tree, whole if new is None else Request(tuple(new), NEXT), want, **more)
    return Turns(said, reply["output_ids"], want, reply["meta_info"]["cached_tokens"], reply)


def _session(
    streaming: bool, tree: Client, plain: Client, request: Request, answer: list[int], length: int, more: Any
) -> Turns:
    opened = tree.http.post(
        "/open_session", json={"capacity_of_str_len": 1000, "streaming": streaming}
    ).json()
    first = turn(tree, replace(request, max_new_tokens=length), answer, session_params={"id": opened})
    said = first["output_ids"]
    where = {"id": opened} if streaming else {"id": opened, "rid": first["meta_info"]["id"]}
    try:
        return _finish(tree, plain, [*request.ids, *said, *more], said, more, session_params=where)
    finally:
        tree.http.post("/close_session", json={"session_id": opened}).raise_for_status()


def streaming_session(*args: Any) -> Turns:
    return _session(True, *args)


def session(*args: Any) -> Turns:
    return _session(False, *args)


def prefix_cache(
    tree: Client, plain: Client, request: Request, answer: list[int], length: int, more: Sequence[int]
) -> Turns:
    said = turn(tree, replace(request, max_new_tokens=length), answer)["output_ids"]
    return _finish(tree, plain, [*request.ids, *said, *more], said, None)


def left_in_mid_stream(
    tree: Client, plain: Client, request: Request, answer: list[int], length: int, more: Sequence[int]
) -> Turns:
    """The client goes once it has at least ``length`` tokens, and comes back with them.

    It comes back when the server has noticed, so run these one at a time: before that the cache holds
    the prompt alone.
    """
    body = with_answer(body_of(request, ignore_eos=True), answer) | {"stream": True}
    count = 0
    with tree.http.stream("POST", "/generate", json=body) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                count = json.loads(line[6:])["meta_info"]["completion_tokens"]
            if count >= length:
                break
    until(lambda: load(tree)["num_running_reqs"] == 0)
    return _finish(tree, plain, [*request.ids, *answer[:count], *more], answer[:count], None)
