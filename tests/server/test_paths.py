"""Tiny float32 models: paths off the spine, budgets below the block, requests at the context limit."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file

from sglang_dflash.cli.trace import tokens_of
from sglang_dflash.client.ports import port_is_free
from sglang_dflash.step.trace import ANSWERED, ASKED
from tests import tiny
from tests.server.kept import Keeper, Turns, left_in_mid_stream, prefix_cache, session, streaming_session
from tests.server.processes import LONG, all_gone, family, stream
from tests.server.support import (
    PINNED,
    Client,
    Pair,
    Request,
    accept_length,
    body_of,
    dflash_args,
    tiny_args,
    visible,
    with_answer,
)
from tests.server.watch import call, running

pytestmark = pytest.mark.server

BLOCK = tiny.DrafterSpec().block_size
CONTEXT = tiny.TargetSpec().max_position


def requests_for(count: int, new_tokens: int, seed: int) -> list[Request]:
    draw = random.Random(seed)
    return [
        Request(tuple(draw.randrange(3, 250) for _ in range(draw.randrange(1, 60))), new_tokens)
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def paged(launch: Callable[..., Client], tiny_pair: tuple[Path, Path], oracle_env: dict[str, str]) -> Client:
    target, drafter = tiny_pair
    more = ["--page-size", "16", "--enable-streaming-session", "--reasoning-parser", "deepseek-r1"]
    return launch("oracle-16", tiny_args(target, *dflash_args(drafter, 24), *more), **oracle_env)


@pytest.fixture(params=[1, 16], ids=lambda page_size: f"page{page_size}")
def tree(request: pytest.FixtureRequest) -> Client:
    """The oracle's right tokens sit beside the spine at every third depth."""
    return request.getfixturevalue("tiny_tree" if request.param == 1 else "paged")


@pytest.mark.parametrize(("batch", "width"), [(1, PINNED), (5, PINNED), (5, "random:2")])
def test_off_spine_paths(batch: int, width: str, tiny_plain: Client, tree: Client) -> None:
    bodies = [body_of(request, ignore_eos=True) for request in requests_for(12, 60, seed=7)]
    with tree.width(width):
        pair = Pair(tiny_plain, tree)
        _, got = pair.compare(bodies, batch, at_least=3.5 if width == PINNED else 1.5)
    print(f"accept length {accept_length(got):.2f}")


@pytest.mark.parametrize("width", [PINNED, "random:4"])
def test_traced_steps_spell_the_answer(width: str, tiny_plain: Client, tree: Client) -> None:
    """Of several requests every second asks: its steps' paths are its answer. The others are told nothing."""
    bodies = [body_of(request, ignore_eos=True) for request in requests_for(6, 40, seed=9)]
    for body in bodies[::2]:
        body["sampling_params"]["custom_params"] = {ASKED: True}
    with tree.width(width):
        _, got = Pair(tiny_plain, tree).compare(bodies, 3, at_least=1.5)
    # SGLang gives every reply of an output batch the key.
    assert not any(step for reply in got[1::2] for step in reply["meta_info"].get(ANSWERED) or [])
    for reply in got[::2]:
        ids, said = reply["output_ids"], reply["meta_info"][ANSWERED]
        assert len(said) == len(ids)
        starts = [i for i, step in enumerate(said) if step is not None]
        assert starts[0] == 1, "the first token is the prefill's"
        for first, end in pairwise([*starts, len(ids)]):
            step = said[first]
            assert step["tree"][0][0] == ids[first - 1], "the root is the last token before"
            path = [step["tree"][node][0] for node in step["path"][1:]]
            assert path[: end - first] == ids[first : first + len(path)][: end - first]
            assert end - first == len(path) + 1 or end == len(ids)
        ways = {how for _, how, _ in tokens_of(ids, said)}
        assert width != PINNED or {"spine", "branch", "bonus"} <= ways


LENGTHS = range(1, 25)
KEEPERS: dict[str, Keeper] = {
    "streaming session": streaming_session,
    "session": session,
    "prefix cache": prefix_cache,
    "left in mid-stream": left_in_mid_stream,
}


@pytest.mark.parametrize(
    ("keeper", "width"), [*((keeper, PINNED) for keeper in KEEPERS), ("streaming session", "random:1")]
)
def test_the_next_turn_finds_the_accepted_rows(
    keeper: str, width: str, tiny_plain: Client, tree: Client
) -> None:
    """Whatever keeps a request's cache beyond its end, however many tokens the request had."""
    draw = random.Random(keeper)
    requests = requests_for(len(LENGTHS), 40, seed=len(keeper))
    answers = [reply["output_ids"] for reply in tiny_plain.generate(requests, 4, ignore_eos=True)]
    more = [tuple(draw.randrange(3, 250) for _ in range(draw.randrange(1, 6))) for _ in requests]

    def turns(row: int) -> Turns:
        return KEEPERS[keeper](tree, tiny_plain, requests[row], answers[row], LENGTHS[row], more[row])

    with tree.width(width), ThreadPoolExecutor(1 if keeper == "left in mid-stream" else 4) as pool:
        results = list(pool.map(turns, range(len(requests))))
    for length, request, answer, turn in zip(LENGTHS, requests, answers, results, strict=True):
        assert turn.first == answer[: len(turn.first)], length
        assert turn.second == turn.want, length
        written = len(request.ids) + len(turn.first) - 1
        if keeper == "streaming session":
            assert turn.cached in (written, written + 1)
        elif keeper != "session":
            assert turn.cached >= written // 16 * 16, length
    assert accept_length([turn.reply for turn in results]) > (1.2 if width != PINNED else 2)


@pytest.mark.parametrize("width", [PINNED, "random:3"])
def test_retracted_again_and_again(width: str, tiny_plain: Client, tree: Client) -> None:
    requests = requests_for(6, 150, seed=12)
    bodies = [body_of(request, ignore_eos=True) for request in requests]
    want = tiny_plain.post_all(bodies, 4)
    told = [with_answer(body, reply["output_ids"]) for body, reply in zip(bodies, want, strict=True)]
    with tree.width(width), running(tree, told) as jobs:
        while not any(job.done() for job in jobs):
            call(tree, "/pause_generation", mode="retract")
            call(tree, "/continue_generation")
            time.sleep(0.03)  # a quick machine is done in a third of a second
        got = [job.result() for job in jobs]
    assert [visible(reply) for reply in got] == [visible(reply) for reply in want]
    assert min(reply["meta_info"]["num_retractions"] for reply in got) >= 2


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 9])
def test_reasoning_tokens_end_where_the_answer_ends(limit: int, tiny_plain: Client, paged: Client) -> None:
    """Nothing closes the reasoning, so all tokens of an answer are of it, and none past it."""
    requests = requests_for(4, 24, seed=13)
    answers = [reply["output_ids"] for reply in tiny_plain.generate(requests, 4, ignore_eos=True)]
    for stop in ({"max_new_tokens": limit}, {"stop_token_ids": "at"}):
        bodies = []
        for request, answer in zip(requests, answers, strict=True):
            params = stop if "max_new_tokens" in stop else {"stop_token_ids": [answer[limit]]}
            body = body_of(request) | {"require_reasoning": True}
            body["sampling_params"] |= params
            bodies.append(with_answer(body, answer))
        got = [reply["meta_info"] for reply in paged.post_all(bodies, 4)]
        assert [meta["reasoning_tokens"] for meta in got] == [meta["completion_tokens"] for meta in got]


@pytest.fixture(scope="module")
def narrow(launch: Callable[..., Client], tiny_pair: tuple[Path, Path]) -> Client:
    """N = B / 2: the draft block writes more slots than the tree. It takes prompts as embeddings."""
    target, drafter = tiny_pair
    more = ["--page-size", "1", "--disable-radix-cache", "--enable-streaming-session"]
    return launch("narrow", tiny_args(target, *dflash_args(drafter, BLOCK // 2), *more))


def test_budget_below_the_block(tiny_plain: Client, narrow: Client) -> None:
    """Neighbours in flight are canaries: a slot written that is not one's own shows in their text."""
    requests = requests_for(16, 80, seed=3)
    want = [reply["output_ids"] for reply in tiny_plain.generate(requests, 1, ignore_eos=True)]
    for batch in (1, 8):
        got = [reply["output_ids"] for reply in narrow.generate(requests, batch, ignore_eos=True)]
        assert got == want


def test_requests_end_at_the_context_limit(tiny_plain: Client, narrow: Client) -> None:
    draw = random.Random(4)
    lengths = [CONTEXT - 40 - i for i in range(8)]
    requests = [
        Request(tuple(draw.randrange(3, 250) for _ in range(length)), CONTEXT - length - 1)
        for length in lengths
    ]
    want = tiny_plain.generate(requests, 1, ignore_eos=True)
    got = narrow.generate(requests, 8, ignore_eos=True)
    assert [r["output_ids"] for r in got] == [r["output_ids"] for r in want]
    assert [r["meta_info"]["finish_reason"]["type"] for r in got] == ["length"] * len(requests)


def test_bad_requests_get_an_http_error_and_the_server_lives(narrow: Client) -> None:
    too_long = narrow.http.post(
        "/generate", json={"input_ids": [5] * (CONTEXT + 5), "sampling_params": {"max_new_tokens": 4}}
    )
    assert too_long.status_code == 400
    vocab = tiny.TargetSpec().vocab_size
    # SGLang alone takes the last four and its scheduler ends.
    for ids in ([], [5, vocab], [5, -1], [[5, 6], []], [[5, 6], [vocab]]):
        bad = narrow.http.post("/generate", json={"input_ids": ids, "sampling_params": {"max_new_tokens": 4}})
        assert bad.status_code == 400, ids
    for prompt in (["hello", ""], [[5, 6], [vocab]], [vocab]):
        bad = narrow.http.post("/v1/completions", json={"model": "m", "prompt": prompt, "max_tokens": 4})
        assert bad.status_code == 400, prompt
    rows = [[0.5] * tiny.TargetSpec().hidden_size] * 3
    for embeds in (
        [],
        [[]],
        [[0.5] * 10] * 3,
        [*rows, [0.5]],
        [[1e39, *rows[0][1:]]],
        rows * CONTEXT,
        "text",
    ):
        bad = narrow.http.post("/generate", json={"input_embeds": embeds, "sampling_params": {}})
        assert bad.status_code == 400, embeds
    for more in (
        {"session_params": {"id": ["a"]}},
        {"session_params": {"id": "a", "colour": 1}},
        {"sampling_params": {"top_k": 2**40}},
        {"sampling_params": {"stop_regex": "("}},
        {"return_logprob": True, "top_logprobs_num": 99999},
        {"positional_embed_overrides": [1]},
        {"return_sampling_mask": True, "sampling_params": {"top_k": 1}},
        {"return_routed_experts": True},
    ):
        bad = narrow.http.post("/generate", json={"input_ids": [5]} | more)
        assert bad.status_code == 400, more
    assert narrow.post(input_ids=[5, 6, 7], sampling_params={"temperature": 0, "max_new_tokens": 4})[
        "output_ids"
    ]


def test_prompts_as_embeddings(narrow: Client, tiny_plain: Client, tiny_pair: tuple[Path, Path]) -> None:
    """The model's own embeddings of token ids say what the ids say, also beside requests with ids."""
    table = load_file(tiny_pair[0] / "model.safetensors")["model.embed_tokens.weight"]
    requests = requests_for(16, 30, seed=8)
    want = [reply["output_ids"] for reply in tiny_plain.generate(requests, 4, ignore_eos=True)]
    bodies = [body_of(request, ignore_eos=True) for request in requests]
    for body in bodies[::2]:
        body["input_embeds"] = table[body.pop("input_ids")].tolist()
    for batch in (1, 8):
        assert [reply["output_ids"] for reply in narrow.post_all(bodies, batch)] == want


def test_turns_that_a_streaming_session_refuses(narrow: Client) -> None:
    """Two turns at once, in one body and in two, and embeddings: refused, and the session goes on."""
    for _ in range(3):
        session = narrow.http.post(
            "/open_session", json={"capacity_of_str_len": 999, "streaming": True}
        ).json()
        turn = body_of(Request((5, 6, 7), 20), ignore_eos=True) | {"session_params": {"id": session}}
        both = narrow.http.post("/generate", json=turn | {"input_ids": [[5, 6, 7], [8, 9]]})
        assert both.status_code in (200, 400)
        with ThreadPoolExecutor(6) as pool:
            replies = list(pool.map(lambda body: narrow.http.post("/generate", json=body), [turn] * 6))
        assert {reply.status_code for reply in replies} <= {200, 400}
        rows = [[0.5] * tiny.TargetSpec().hidden_size] * 3
        embeds = narrow.http.post("/generate", json=turn | {"input_ids": None, "input_embeds": rows})
        assert embeds.status_code == 400
        assert "session" in embeds.json()["error"]["message"]
        assert len(narrow.post(**turn)["output_ids"]) == 20
        assert narrow.http.post("/close_session", json={"session_id": session}).status_code == 200


def test_a_killed_scheduler_ends_the_server(narrow: Client, tiny_plain: Client) -> None:
    """The last test on this server."""
    processes = family(narrow)
    schedulers = [process for process in processes if "scheduler" in " ".join(process.cmdline())]
    assert len(schedulers) == 1
    tokens, finish, orderly = stream(narrow, schedulers[0].kill)
    assert not orderly or finish is None or finish.get("type") == "abort"
    want = tiny_plain.generate([LONG], 1, ignore_eos=True)[0]["output_ids"]
    assert 0 < len(tokens) < len(want)
    assert tokens == want[: len(tokens)]
    assert all_gone(processes)
    assert port_is_free("127.0.0.1", narrow.server.port)
    with pytest.raises(httpx.HTTPError):
        narrow.http.get("/health")


def test_a_restart_serves_and_sigterm_in_mid_stream_leaves_nobody(
    launch: Callable[..., Client], narrow: Client, tiny_plain: Client
) -> None:
    again = launch("again", narrow.server.args)
    want = tiny_plain.generate([LONG], 1, ignore_eos=True)[0]["output_ids"]
    assert again.generate([LONG], 1, ignore_eos=True)[0]["output_ids"] == want
    processes = family(again)
    # SGLang's own post-warmup request can come before its port is open; it warns with a traceback.
    start = len(again.server.output())
    tokens, _, _ = stream(again, processes[0].terminate)
    assert tokens
    assert tokens == want[: len(tokens)]
    assert all_gone(processes)
    assert port_is_free("127.0.0.1", again.server.port)
    assert "Traceback" not in again.server.output()[start:]
