"""Scheduling under flags of its own: small chunks, mixed batches, no KV left, priorities, large pages."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.server import logit_processors as those
from tests.server.support import (
    PINNED,
    Client,
    Pair,
    Request,
    Serving,
    body_of,
    dflash_args,
    tiny_args,
    visible,
    with_answer,
)
from tests.server.watch import load, running, until

pytestmark = [pytest.mark.server, pytest.mark.slow]

#: Room for about two of this file's requests, of four that may run.
TOKENS = 640
RUNNING = 4


@pytest.fixture(scope="module")
def tight(serving: Serving, tiny_pair: tuple[Path, Path], oracle_env: dict[str, str]) -> Any:
    target, drafter = tiny_pair
    args = [
        *tiny_args(target, *dflash_args(drafter, 24), "--page-size", "1"),
        *("--chunked-prefill-size", "16", "--enable-mixed-chunk", "--enable-priority-scheduling"),
        *("--max-total-tokens", str(TOKENS), "--max-running-requests", str(RUNNING)),
        "--enable-custom-logit-processor",
    ]
    with serving("tight", args, **oracle_env) as client:
        yield client


def long_requests(count: int, seed: int, new_tokens: int = 120) -> list[Request]:
    draw = random.Random(seed)
    return [
        Request(tuple(draw.randrange(3, 250) for _ in range(draw.randrange(40, 100))), new_tokens)
        for _ in range(count)
    ]


GREEDY: list[dict[str, Any]] = [
    {},
    {"frequency_penalty": 0.6},
    {"repetition_penalty": 1.2},
    {"presence_penalty": 0.4, "min_new_tokens": 60},
    {"regex": "([a-z][0-9]){60}"},
]
SEEDED: list[dict[str, Any]] = [
    {"temperature": 0.8},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_p": 0.9, "frequency_penalty": 0.6},
    {"temperature": 0.8, "top_k": 20, "min_p": 0.02},
    {"temperature": 1.0, "regex": "([a-z][0-9]){60}"},
]


@pytest.mark.parametrize("kinds", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_chunks_mixed_batches_and_retraction(
    kinds: list[dict[str, Any]], tight: Client, tiny_plain: Client
) -> None:
    """A seeded request's noise depends on its seed and positions, not on how often it was prefilled."""
    seeds = [{"sampling_seed": 40 + i} if kinds is SEEDED else {} for i in range(15)]
    bodies = [
        body_of(request, ignore_eos=True, **kinds[i % len(kinds)], **seeds[i])
        for i, request in enumerate(long_requests(15, seed=1 if kinds is GREEDY else 6))
    ]
    want, got = Pair(tiny_plain, tight).compare(bodies, 10, at_least=0)
    if kinds is SEEDED:
        greedy = [body_of(request, ignore_eos=True) for request in long_requests(2, seed=6)]
        likeliest = [reply["output_ids"] for reply in tiny_plain.post_all(greedy, 2)]
        assert all(reply["output_ids"] not in likeliest for reply in want[:2]), "nothing was sampled"
    meta = [reply["meta_info"] for reply in got]
    log = tight.server.output()
    if PINNED == "fixed":  # else steps narrow to plain ones, and nobody is retracted
        assert "KV cache pool is full. Retract requests." in log
        assert sum(entry["num_retractions"] for entry in meta) >= 2
    assert "#new-token: 16," in log, "no prompt was cut into chunks"
    # Tokens of mixed batches are nobody's draft and nobody's bonus (the last step's surplus aside).
    undrafted = [
        entry["completion_tokens"] - 1 - entry["spec_num_correct_drafts"] - entry["spec_verify_ct"]
        for entry in meta
    ]
    assert max(undrafted) > 0, "no running request shared a batch with a prefill"


@pytest.mark.parametrize("kind", [those.WriteAt, those.WriteAtDeclared])
def test_processors_in_mixed_batches(kind: type, tight: Client, tiny_plain: Client) -> None:
    """A prefill chunk beside running requests: these have said more than the host knows yet."""
    requests = long_requests(10, seed=31, new_tokens=40)
    bodies = [
        body_of(request, ignore_eos=True, custom_params={"at": 2 + at}) for at, request in enumerate(requests)
    ]
    Pair(tiny_plain, tight).compare(
        [body | {"custom_logit_processor": kind.to_str()} for body in bodies], 10, at_least=0
    )


def test_no_more_than_the_allowed_number_runs(tight: Client, tiny_plain: Client) -> None:
    requests = [Request(request.ids[:20], 60) for request in long_requests(10, seed=2)]
    bodies = [body_of(request, ignore_eos=True) for request in requests]
    want = tiny_plain.post_all(bodies, 4)
    told = [with_answer(body, reply["output_ids"]) for body, reply in zip(bodies, want, strict=True)]
    most, queued = 0, 0
    with ThreadPoolExecutor(len(told)) as pool:
        jobs = [pool.submit(tight.post, **body) for body in told]
        while not all(job.done() for job in jobs):
            now = load(tight)
            most, queued = max(most, now["num_running_reqs"]), max(queued, now["num_waiting_reqs"])
        got = [job.result() for job in jobs]
    assert [visible(reply) for reply in got] == [visible(reply) for reply in want]
    assert most <= RUNNING
    assert queued > 0


def test_priorities(tight: Client, tiny_plain: Client) -> None:
    """An urgent request overtakes the queue; neither it nor those it displaced change."""
    bodies = [body_of(request, ignore_eos=True) for request in long_requests(7, seed=3)]
    want = tiny_plain.post_all(bodies, 4)
    told = [with_answer(body, reply["output_ids"]) for body, reply in zip(bodies, want, strict=True)]
    ends: dict[int, float] = {}

    def post(index: int) -> dict[str, Any]:
        reply = tight.post(**told[index], priority=10 if index == 6 else 0)
        ends[index] = time.monotonic()
        return reply

    with ThreadPoolExecutor(7) as pool:
        jobs = [pool.submit(post, index) for index in range(6)]
        until(lambda: load(tight)["num_waiting_reqs"] >= 3)
        jobs.append(pool.submit(post, 6))
        got = [job.result() for job in jobs]
    assert [visible(reply) for reply in got] == [visible(reply) for reply in want]
    assert sum(ends[6] < ends[index] for index in range(6)) >= 3


class TestLargePages:
    @pytest.fixture(scope="class")
    def paged(self, serving: Serving, tiny_pair: tuple[Path, Path], oracle_env: dict[str, str]) -> Any:
        target, drafter = tiny_pair
        args = tiny_args(target, *dflash_args(drafter, 24), "--page-size", "64")
        with serving("page64", args, **oracle_env) as client:
            yield client

    def test_page_size_64(self, paged: Client, tiny_plain: Client) -> None:
        bodies = [body_of(request, ignore_eos=True) for request in long_requests(10, seed=4)]
        pair = Pair(tiny_plain, paged)
        pair.compare(bodies, 6)
        _, again = pair.compare(bodies, 6)
        assert min(reply["meta_info"]["cached_tokens"] for reply in again if reply) in (0, 64)
        assert max(reply["meta_info"]["cached_tokens"] for reply in again) == 64

    def test_pause_with_retraction(self, paged: Client, tiny_plain: Client) -> None:
        bodies = [body_of(request, ignore_eos=True) for request in long_requests(4, seed=5, new_tokens=200)]
        want = tiny_plain.post_all(bodies, 4)
        told = [with_answer(body, reply["output_ids"]) for body, reply in zip(bodies, want, strict=True)]
        with running(paged, told) as jobs:
            assert paged.http.post("/pause_generation", json={"mode": "retract"}).status_code == 200
            assert paged.http.post("/continue_generation", json={}).status_code == 200
            got = [job.result() for job in jobs]
        assert [visible(reply) for reply in got] == [visible(reply) for reply in want]
        assert [reply["meta_info"]["num_retractions"] for reply in got] == [1] * 4
