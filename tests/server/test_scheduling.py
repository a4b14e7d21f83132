"""What the scheduler does to a running request leaves no trace in its output."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.server.support import Pair, Request, accept_length, body_of, visible, with_answer
from tests.server.watch import call, flushed, load, running, until

pytestmark = pytest.mark.server

LENGTH = 200


def requests(count: int, seed: int) -> list[Request]:
    draw = random.Random(seed)
    return [Request(tuple(draw.randrange(3, 250) for _ in range(24)), LENGTH) for _ in range(count)]


PARAMS: list[dict[str, Any]] = [
    {},
    {"frequency_penalty": 0.6, "presence_penalty": 0.2},
    {"repetition_penalty": 1.2},
    {"regex": "([a-z][0-9]){100}"},
]


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_pause_and_continue(mode: str, tiny_servers: Pair) -> None:
    """With "retract" the requests lose their KV and are prefilled again with what they have said."""
    bodies = [
        body_of(request, ignore_eos=True, **params) | {"return_logprob": True}
        for request, params in zip(requests(4, seed=1), PARAMS, strict=True)
    ]
    want = tiny_servers.plain.post_all(bodies, 4)
    told = [with_answer(body, reply["output_ids"]) for body, reply in zip(bodies, want, strict=True)]
    tree = tiny_servers.tree
    with running(tree, told) as jobs:
        call(tree, "/pause_generation", mode=mode)
        try:
            if mode == "retract":
                # Refused while a request holds KV.
                assert tree.http.post("/flush_cache").status_code == 200
            assert not any(job.done() for job in jobs), "they ended before the pause"
        finally:
            call(tree, "/continue_generation")
        got = [job.result() for job in jobs]
    assert [visible(reply) for reply in got] == [visible(reply) for reply in want]
    for left, right in zip(want, got, strict=True):
        pairs = zip(
            left["meta_info"]["output_token_logprobs"],
            right["meta_info"]["output_token_logprobs"],
            strict=True,
        )
        assert max(abs(a[0] - b[0]) for a, b in pairs) < 1e-4
        assert right["meta_info"]["num_retractions"] == (1 if mode == "retract" else 0)
    assert accept_length(got) > 2.5


def test_clients_that_leave_in_mid_stream_give_their_kv_back(tiny_servers: Pair) -> None:
    """Neighbours of the aborted requests go on unharmed."""
    tree = tiny_servers.tree
    flushed(tree)
    stay, leave = requests(2, seed=2), requests(3, seed=3)
    want = tiny_servers.plain.post_all([body_of(request, ignore_eos=True) for request in stay], 2)
    told = [
        with_answer(body_of(request, ignore_eos=True), reply["output_ids"])
        for request, reply in zip(stay, want, strict=True)
    ]
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(tree.post, **body) for body in told]
        for request in leave:
            body = body_of(request, ignore_eos=True) | {"stream": True}
            with tree.http.stream("POST", "/generate", json=body) as reply:
                lines = (line for line in reply.iter_lines() if line.startswith("data: {"))
                for _ in range(3):
                    assert json.loads(next(lines)[6:])["output_ids"]
        got = [job.result() for job in jobs]
    assert [visible(reply) for reply in got] == [visible(reply) for reply in want]
    until(lambda: load(tree)["num_running_reqs"] == 0)
    flushed(tree)


def test_abort_by_request_id(tiny_servers: Pair) -> None:
    tree = tiny_servers.tree
    flushed(tree)
    bodies = [
        body_of(request, ignore_eos=True) | {"rid": f"request-{i}"}
        for i, request in enumerate(requests(3, seed=4))
    ]
    with running(tree, bodies) as jobs:
        call(tree, "/abort_request", rid="request-1")
        got = [job.result() for job in jobs]
    assert [reply["meta_info"]["finish_reason"]["type"] for reply in got] == ["length", "abort", "length"]
    want = tiny_servers.plain.post_all([bodies[0], bodies[2]], 2)
    assert [visible(got[0]), visible(got[2])] == [visible(reply) for reply in want]
    flushed(tree)


def test_flush_cache_and_radix_hits(tiny_servers: Pair) -> None:
    """The drafter's KV of a cached prefix comes from the cache as well."""
    tree = tiny_servers.tree
    bodies = [body_of(request, ignore_eos=True) for request in requests(4, seed=5)]
    flushed(tree)
    _, cold = tiny_servers.compare(bodies, 4)
    _, warm = tiny_servers.compare(bodies, 4)
    flushed(tree)
    _, again = tiny_servers.compare(bodies, 4)
    cached = [[reply["meta_info"]["cached_tokens"] for reply in replies] for replies in (cold, warm, again)]
    assert cached[0] == cached[2] == [0] * 4
    assert min(cached[1]) >= 20
