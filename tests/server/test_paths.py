"""Tiny float32 models: paths off the spine, budgets below the block, requests at the context limit."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import tiny
from tests.server.support import COMMON, Client, Request, dflash_args

pytestmark = pytest.mark.server

BLOCK = tiny.DrafterSpec().block_size
CONTEXT = tiny.TargetSpec().max_position


def requests_for(count: int, new_tokens: int, seed: int) -> list[Request]:
    draw = random.Random(seed)
    return [
        Request(tuple(draw.randrange(3, 250) for _ in range(draw.randrange(1, 60))), new_tokens)
        for _ in range(count)
    ]


def args(target: Path, *more: str) -> list[str]:
    return ["--model-path", str(target), "--dtype", "float32", "--max-total-tokens", "4096", *COMMON, *more]


@pytest.fixture(scope="module")
def plain(launch: Callable[..., Client], tiny_pair: tuple[Path, Path]) -> Client:
    return launch("plain", args(tiny_pair[0]))


@pytest.mark.parametrize("page_size", [1, 16])
def test_off_spine_paths(
    page_size: int,
    plain: Client,
    launch: Callable[..., Client],
    tiny_pair: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The oracle's right tokens sit beside the spine at every third depth."""
    requests = requests_for(12, 60, seed=page_size)
    want = [reply["output_ids"] for reply in plain.generate(requests, 1, ignore_eos=True)]
    answers = tmp_path_factory.mktemp("oracle") / "answers.json"
    answers.write_text(
        json.dumps({" ".join(map(str, r.ids)): out for r, out in zip(requests, want, strict=True)})
    )
    target, drafter = tiny_pair
    root = str(Path(__file__).resolve().parents[2])
    tree = launch(
        f"oracle-{page_size}",
        args(target, *dflash_args(drafter, 24), "--page-size", str(page_size)),
        SGLANG_DFLASH_CANDIDATES="tests.server.oracle:candidates",
        DFLASH_TEST_ORACLE=str(answers),
        PYTHONPATH=root,
    )
    for batch in (1, 5):
        replies = tree.generate(requests, batch, ignore_eos=True)
        assert [reply["output_ids"] for reply in replies] == want
        tokens = sum(reply["meta_info"]["completion_tokens"] for reply in replies)
        passes = sum(reply["meta_info"]["spec_verify_ct"] for reply in replies)
        print(f"page {page_size} batch {batch}: accept length {tokens / passes:.2f}")
        assert tokens / passes > 3.5


@pytest.fixture(scope="module")
def narrow(launch: Callable[..., Client], tiny_pair: tuple[Path, Path]) -> Client:
    """N = B / 2: the draft block writes more slots than the tree."""
    target, drafter = tiny_pair
    return launch("narrow", args(target, *dflash_args(drafter, BLOCK // 2), "--page-size", "1"))


def test_budget_below_the_block(plain: Client, narrow: Client) -> None:
    """Neighbours in flight are canaries: a slot written that is not one's own shows in their text."""
    requests = requests_for(16, 80, seed=3)
    want = [reply["output_ids"] for reply in plain.generate(requests, 1, ignore_eos=True)]
    for batch in (1, 8):
        got = [reply["output_ids"] for reply in narrow.generate(requests, batch, ignore_eos=True)]
        assert got == want


def test_requests_end_at_the_context_limit(plain: Client, narrow: Client) -> None:
    draw = random.Random(4)
    lengths = [CONTEXT - 40 - i for i in range(8)]
    requests = [
        Request(tuple(draw.randrange(3, 250) for _ in range(length)), CONTEXT - length - 1)
        for length in lengths
    ]
    want = plain.generate(requests, 1, ignore_eos=True)
    got = narrow.generate(requests, 8, ignore_eos=True)
    assert [r["output_ids"] for r in got] == [r["output_ids"] for r in want]
    assert [r["meta_info"]["finish_reason"]["type"] for r in got] == ["length"] * len(requests)


def test_bad_requests_get_an_http_error_and_the_server_lives(narrow: Client) -> None:
    too_long = narrow.http.post(
        "/generate", json={"input_ids": [5] * (CONTEXT + 5), "sampling_params": {"max_new_tokens": 4}}
    )
    assert too_long.status_code == 400
    empty = narrow.http.post("/generate", json={"input_ids": [], "sampling_params": {"max_new_tokens": 4}})
    assert empty.status_code == 400
    assert narrow.post(input_ids=[5, 6, 7], sampling_params={"temperature": 0, "max_new_tokens": 4})[
        "output_ids"
    ]
