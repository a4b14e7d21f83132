"""Tiny float32 models: paths off the spine, budgets below the block, requests at the context limit."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from sglang_dflash.client.ports import port_is_free
from tests import tiny
from tests.server.processes import LONG, all_gone, family, stream
from tests.server.support import Client, Pair, Request, accept_length, body_of, dflash_args, tiny_args

pytestmark = pytest.mark.server

BLOCK = tiny.DrafterSpec().block_size
CONTEXT = tiny.TargetSpec().max_position


def requests_for(count: int, new_tokens: int, seed: int) -> list[Request]:
    draw = random.Random(seed)
    return [
        Request(tuple(draw.randrange(3, 250) for _ in range(draw.randrange(1, 60))), new_tokens)
        for _ in range(count)
    ]


@pytest.fixture(scope="module", params=[1, 16], ids=lambda page_size: f"page{page_size}")
def tree(
    request: pytest.FixtureRequest,
    tiny_tree: Client,
    launch: Callable[..., Client],
    tiny_pair: tuple[Path, Path],
    oracle_env: dict[str, str],
) -> Client:
    """The oracle's right tokens sit beside the spine at every third depth."""
    if request.param == 1:
        return tiny_tree
    target, drafter = tiny_pair
    return launch(
        "oracle-16",
        tiny_args(target, *dflash_args(drafter, 24), "--page-size", "16"),
        **oracle_env,
    )


@pytest.mark.parametrize("batch", [1, 5])
def test_off_spine_paths(batch: int, tiny_plain: Client, tree: Client) -> None:
    bodies = [body_of(request, ignore_eos=True) for request in requests_for(12, 60, seed=7)]
    _, got = Pair(tiny_plain, tree).compare(bodies, batch, at_least=3.5)
    print(f"accept length {accept_length(got):.2f}")


@pytest.fixture(scope="module")
def narrow(launch: Callable[..., Client], tiny_pair: tuple[Path, Path]) -> Client:
    """N = B / 2: the draft block writes more slots than the tree."""
    target, drafter = tiny_pair
    return launch("narrow", tiny_args(target, *dflash_args(drafter, BLOCK // 2), "--page-size", "1"))


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
    assert narrow.post(input_ids=[5, 6, 7], sampling_params={"temperature": 0, "max_new_tokens": 4})[
        "output_ids"
    ]


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
