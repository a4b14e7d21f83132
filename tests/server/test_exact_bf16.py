"""The embedded pair in bf16: plain decoding, draft trees, a top-1 tree and SGLang's own chain.

One plain server answers for all of them (four servers in this module, at most two alive).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from sglang_dflash.cli.main import main
from sglang_dflash.client.exact import ServerOracle, Tally, Verdict, judge, tally
from sglang_dflash.drafter import read_config
from tests.server.support import ROOT, Client, Request, chat_requests, dflash_args, embedded_args

pytestmark = pytest.mark.server

Serving = Callable[..., AbstractContextManager[Client]]

#: Prompts by the number of requests in flight: alone they take longest.
BATCHES = {1: 18, 4: 34, 8: 50}
NEW_TOKENS = 32
PROMPTS = sum(BATCHES.values())
LOGPROB_PROMPTS = 6
PENALTIES = {"frequency_penalty": 1.9, "presence_penalty": 0.9, "repetition_penalty": 1.8}
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


def eval_apart(client: Client, policy: str, folder: Path) -> float:
    """``sglang-dflash eval --server``: served accept length over the offline one, minus one, of the answers
    that are equal. Where a near-tie sends the texts apart the lengths are of two texts: no more than 10 %."""
    numbers = folder / "numbers.json"
    args = ["--prompts", str(ROOT / "benchmarks" / "prompts.jsonl"), "--limit", "12", "--max-new", "48"]
    args += ["--budgets", "16", "--server", client.server.url, "--json-out", str(numbers)]
    assert main(["eval", *args]) == 0
    served = json.loads(numbers.read_text())["served"]
    assert served["policy"] == policy
    assert served["answers"] == 12
    assert set(served["accept_length"]) == set(served["offline"]) == {"all", "chat", "code", "equal"}
    print(f"\n{served}")
    apart = {name: served["accept_length"][name] / served["offline"][name] - 1 for name in served["offline"]}
    assert abs(apart["all"]) <= 0.1
    return apart["equal"]


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

    def test_eval_says_offline_what_is_served(self, tree: Client, tmp_path: Path) -> None:
        nodes = tree.info().speculative_num_draft_tokens
        assert abs(eval_apart(tree, f"tree-{nodes}", tmp_path)) <= 0.03

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


class TestChain:
    """A tree of the top-1 path alone is the chain: same tokens, same steps."""

    COUNT = 12

    def test_a_tree_of_the_spine_alone_is_the_builtin_chain(
        self, serving: Serving, plain: Plain, target: Path, drafter: Path
    ) -> None:
        requests = plain.requests[: self.COUNT]
        block = read_config(drafter).block
        args = embedded_args(target, "bfloat16", *dflash_args(drafter, block))
        # Without our general plugin, the built-in worker serves on our CPU platform.
        with serving("chain", args, SGLANG_PLUGINS="dflash_cpu") as client:
            assert client.info().marker is None
            chain = client.generate(requests, 1)
            # The same prefills again: a cached prefix rounds otherwise.
            assert client.http.post("/flush_cache", params={"timeout": 60}).status_code == 200
            ignored = client.generate(requests[:3], 1, **PENALTIES)
            early = {"stop_token_ids": [chain[0]["output_ids"][6]], "min_new_tokens": 16}
            stopped = client.generate(requests[:1], 1, **early)[0]
        # The same drafts, as a tree: of this drafter the walk of its selector.
        walk = {"SGLANG_DFLASH_CANDIDATES": "tests.server.walk:candidates", "PYTHONPATH": str(ROOT)}
        with serving("walk", args, SGLANG_DFLASH_RECALL="0", **walk) as client:
            assert f"draft trees on. nodes={block} block={block}" in client.server.output()
            tree = client.generate(requests, 1)
            penalised = client.generate(requests[:3], 1, **PENALTIES)
            went_on = client.generate(requests[:1], 1, **early)[0]
        for left, right in zip(chain, tree, strict=True):
            assert left["output_ids"] == right["output_ids"]
            assert left["meta_info"]["spec_verify_ct"] == right["meta_info"]["spec_verify_ct"]
        part = Plain(plain.client, plain.oracle, requests, plain.outputs[: self.COUNT])
        assert compare(part, tree).ok
        # What SGLang's chain says with penalties is what it says without, and it stops too soon.
        assert stopped["meta_info"]["completion_tokens"] <= 7
        assert went_on["meta_info"]["completion_tokens"] >= 16
        for left, right, free in zip(ignored, penalised, chain, strict=False):
            assert left["output_ids"] == free["output_ids"]
            assert right["output_ids"] != free["output_ids"]
