"""The embedded pair in bf16: draft trees beside plain decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from sglang_dflash.client.exact import ServerOracle, Tally, Verdict, judge, tally
from tests.server.support import Client, Request, Serving, chat_requests, dflash_args, embedded_args

pytestmark = pytest.mark.server

#: Prompts by the number of requests in flight: alone they take longest.
BATCHES = {1: 18, 4: 34, 8: 50}
NEW_TOKENS = 32
PROMPTS = sum(BATCHES.values())
LOGPROB_PROMPTS = 6
CANARIES = (
    *("zorblax", "quimpet", "frandle", "wizzock", "plumbor", "gratnik", "vexolot", "snarbel"),
    *("twodrin", "kelpash", "morvint", "druzzle", "hibquat", "jalpeno", "ombrix", "yastrel"),
)


@dataclass
class Plain:
    client: Client
    oracle: ServerOracle
    requests: list[Request]
    outputs: list[list[int]]


def run(client: Client, requests: list[Request]) -> list[dict[str, Any]]:
    left = iter(requests)
    parts = {batch: list(islice(left, count)) for batch, count in BATCHES.items()}
    return [reply for batch, part in parts.items() for reply in client.generate(part, batch)]


def compare(plain: Plain, replies: list[dict[str, Any]]) -> Tally:
    verdicts: list[Verdict] = [
        judge(plain.oracle, request.ids, output, reply["output_ids"], "bfloat16")
        for request, output, reply in zip(plain.requests, plain.outputs, replies, strict=True)
    ]
    counted = tally(verdicts)
    print(f"\n{counted}")
    for verdict in verdicts:
        if verdict.kind != "identical":
            print(f"  {verdict}")
    return counted


@pytest.fixture(scope="module")
def plain(launch: Callable[..., Client], target: Path, tokenizer: Any) -> Iterator[Plain]:
    client = launch("plain", embedded_args(target, "bfloat16"))
    requests = chat_requests(tokenizer, PROMPTS, NEW_TOKENS)
    outputs = [reply["output_ids"] for reply in run(client, requests)]
    oracle = ServerOracle(client.server.url, vocab_size=tokenizer.vocab_size)
    yield Plain(client, oracle, requests, outputs)
    oracle.close()


class TestTree:
    @pytest.fixture(scope="class")
    def tree(self, serving: Serving, plain: Plain, target: Path, drafter: Path) -> Iterator[Client]:
        with serving("tree", embedded_args(target, "bfloat16", *dflash_args(drafter))) as client:
            yield client

    def test_the_tree_worker_serves(self, tree: Client) -> None:
        marker = tree.info().marker
        assert marker is not None
        assert marker.worker == "sglang_dflash.worker.worker.TreeWorker"
        assert marker.mode == "tree"
        assert "draft trees on" in tree.server.output()
        assert "disable_overlap_schedule': False" in tree.server.output()

    def test_outputs_equal_plain_decoding(self, plain: Plain, tree: Client) -> None:
        replies = run(tree, plain.requests)
        assert compare(plain, replies).ok
        drafted = sum(reply["meta_info"]["completion_tokens"] for reply in replies)
        passes = sum(reply["meta_info"]["spec_verify_ct"] for reply in replies)
        print(f"accept length {drafted / passes:.3f} over {drafted} tokens")
        assert drafted / passes > 1.6

    def test_radix_cache_hits_change_nothing(self, plain: Plain, tree: Client) -> None:
        replies = tree.generate(plain.requests[:12], 4)
        assert all(reply["meta_info"]["cached_tokens"] > 0 for reply in replies)
        part = Plain(plain.client, plain.oracle, plain.requests[:12], plain.outputs[:12])
        assert compare(part, replies).ok

    def test_logprobs_equal_plain_decoding(self, plain: Plain, tree: Client) -> None:
        worst = 0.0
        for request in plain.requests[:LOGPROB_PROMPTS]:
            body = {
                "input_ids": list(request.ids),
                "sampling_params": {"temperature": 0, "max_new_tokens": 24},
                "return_logprob": True,
                "top_logprobs_num": 2,
            }
            with ThreadPoolExecutor(1) as pool:
                later = pool.submit(plain.client.post, **body)
                got, want = tree.post(**body), later.result()
            for left, right in zip(
                want["meta_info"]["output_token_logprobs"],
                got["meta_info"]["output_token_logprobs"],
                strict=True,
            ):
                if left[1] != right[1]:
                    break  # a near-tie, judged above: different texts from here on
                worst = max(worst, abs(left[0] - right[0]))
            assert len(got["meta_info"]["output_top_logprobs"]) == len(got["output_ids"])
        print(f"largest log-probability difference {worst:.4f}")
        assert worst < 0.15

    def test_sampling_and_greedy_in_one_batch(self, plain: Plain, tree: Client) -> None:
        requests = plain.requests[:4]
        greedy = tree.generate(requests, 1)
        hot = {"temperature": 1.0, "top_p": 0.9, "top_k": 40, "min_p": 0.01}
        with ThreadPoolExecutor(2) as pool:
            cold_job = pool.submit(tree.generate, requests, 2)
            hot_job = pool.submit(tree.generate, requests, 2, **hot)
            cold, sampled = cold_job.result(), hot_job.result()
        part = Plain(plain.client, plain.oracle, requests, [reply["output_ids"] for reply in greedy])
        assert compare(part, cold).ok
        assert any(a["output_ids"] != b["output_ids"] for a, b in zip(greedy, sampled, strict=True))

    def test_no_request_says_anothers_word(self, tree: Client, tokenizer: Any) -> None:
        """The canary for cross-talk: every request carries a word of its own."""
        requests = []
        for word in CANARIES:
            prompt = f"Repeat this word three times: {word}"
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
            )
            requests.append(Request(tuple(ids), 24))
        texts = [reply["text"].lower() for reply in tree.generate(requests, 8)]
        said = [[word for word in CANARIES if word in text] for text in texts]
        strangers = [words for own, words in zip(CANARIES, said, strict=True) if set(words) - {own}]
        assert strangers == []
        assert sum(words == [own] for own, words in zip(CANARIES, said, strict=True)) >= len(CANARIES) // 2
