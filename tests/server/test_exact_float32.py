"""float32 has no near-ties: every output must equal plain decoding's, token for token.

The same tree server's drafter is compared with z-lab's reference implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_dflash.platform.attention_ops import KEY_TILE
from tests.server.support import (
    ROOT,
    Client,
    Request,
    accept_length,
    chat_requests,
    dflash_args,
    embedded_args,
)

pytestmark = pytest.mark.server

PROMPTS = 12
NEW_TOKENS = 40
STEPS_COMPARED = 12
NODES = 16


@dataclass
class Pair:
    plain: Client
    tree: Client
    tap: Path


@pytest.fixture(scope="module")
def pair(launch: Callable[..., Client], target: Path, drafter: Path, tmp_path_factory: Any) -> Pair:
    tap = tmp_path_factory.mktemp("tap")
    # Without overlap, plain decoding's penalties count every token; with it they lag by one.
    plain = launch("plain32", embedded_args(target, "float32", "--disable-overlap-schedule"))
    tree = launch(
        "tree32",
        embedded_args(target, "float32", *dflash_args(drafter, NODES)),
        SGLANG_DFLASH_CANDIDATES="tests.server.tap:candidates",
        DFLASH_TEST_TAP=str(tap),
        PYTHONPATH=str(ROOT),
    )
    return Pair(plain, tree, tap)


def outputs(client: Client, requests: list[Request], batch: int, **params: Any) -> list[list[int]]:
    return [reply["output_ids"] for reply in client.generate(requests, batch, **params)]


def of_both(
    pair: Pair, requests: list[Request], batch: int, **params: Any
) -> tuple[list[list[int]], list[list[int]]]:
    """What plain decoding and the trees say; each server has its own core to answer on."""
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(outputs, client, requests, batch, **params) for client in (pair.plain, pair.tree)]
        return jobs[0].result(), jobs[1].result()


@pytest.mark.parametrize("batch", [1, 4])
def test_outputs_are_identical(batch: int, pair: Pair, tokenizer: Any) -> None:
    requests = chat_requests(tokenizer, PROMPTS, NEW_TOKENS)
    requests = requests[: PROMPTS // 2] if batch == 1 else requests[PROMPTS // 2 :]
    want, got = of_both(pair, requests, batch)
    assert got == want


@pytest.fixture(scope="module")
def free(pair: Pair, tokenizer: Any) -> list[list[int]]:
    """Plain decoding without a penalty."""
    return outputs(pair.plain, chat_requests(tokenizer, 16, 36)[12:], 4)


@pytest.mark.parametrize(
    "params",
    [
        {"frequency_penalty": 0.8},
        {"presence_penalty": 0.9},
        # Not together with the others: without overlap SGLang applies them in the order of a Python
        # set of classes (sampling/sampling_batch_info.py:276), which differs from start to start.
        {"repetition_penalty": 1.3, "min_new_tokens": 32},
        {"frequency_penalty": -0.3, "presence_penalty": 0.5, "min_new_tokens": 32},
        {"logit_bias": {"28": 4.0, "253": -100.0}},
    ],
    ids=lambda params: "+".join(params),
)
def test_penalties_count_every_token_of_a_path(
    params: dict[str, Any], pair: Pair, free: list[list[int]], tokenizer: Any
) -> None:
    want, got = of_both(pair, chat_requests(tokenizer, 16, 36)[12:], 4, **params)
    assert got == want
    assert want != free, "the penalty changed nothing; the test proves nothing"


# One request of each kind in every eight, so that a batch mixes them all.
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.7},
    {"temperature": 1.0},
    {"temperature": 1.5},
    {"temperature": 0},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.5, "top_k": 40},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 0.7, "top_p": 0.95, "top_k": 100, "min_p": 0.01},
)


def seeded(client: Client, requests: list[Request], batch: int) -> list[list[int]]:
    """Request i has kind i % 8 and seed 100 + i."""

    def one(numbered: tuple[int, Request]) -> list[int]:
        i, request = numbered
        params = {**KINDS[i % len(KINDS)], "sampling_seed": 100 + i}
        reply = client.post(
            input_ids=list(request.ids),
            sampling_params={"max_new_tokens": request.max_new_tokens, **params},
        )
        return reply["output_ids"]

    with ThreadPoolExecutor(batch) as pool:
        return list(pool.map(one, enumerate(requests)))


def test_a_seeded_request_has_one_text(pair: Pair, tokenizer: Any) -> None:
    """Plain or tree, alone or among seven others, before and after they filled the prefix cache."""
    # Not the prompts whose drafts are compared with the reference below.
    requests = chat_requests(tokenizer, 32, 24)[16:]
    with ThreadPoolExecutor(1) as pool:
        want_later = pool.submit(seeded, pair.plain, requests, 8)
        got = seeded(pair.tree, requests, 8)
        want = want_later.result()
        greedy_later = pool.submit(outputs, pair.plain, requests, 8)
        alone = seeded(pair.tree, requests[:8], 1)
        greedy = greedy_later.result()
    assert got == want
    assert alone == want[:8]
    changed = [i for i, output in enumerate(want) if output != greedy[i]]
    assert not {3, 11} & set(changed), "a greedy request was sampled"
    assert len(changed) >= 8, "most sampled requests gave the greedy text: the test proves little"


@pytest.mark.parametrize(
    "params",
    [{"frequency_penalty": 0.8, "presence_penalty": 0.5}, {"repetition_penalty": 1.3}],
    ids=lambda params: "+".join(params),
)
def test_penalties_of_a_seeded_request(params: dict[str, Any], pair: Pair, tokenizer: Any) -> None:
    """The noise is added to what the penalties left, at every node."""
    requests = chat_requests(tokenizer, 37, 24)[33:]
    sampled = {"temperature": 0.8, "top_p": 0.95, "sampling_seed": 9}
    base = outputs(pair.plain, requests, 4, **sampled)
    want, got = of_both(pair, requests, 4, **sampled, **params)
    assert got == want
    assert want != base, "the penalty changed nothing; the test proves nothing"


def test_parallel_samples_of_a_seed_differ_and_repeat(pair: Pair, tokenizer: Any) -> None:
    ids = list(chat_requests(tokenizer, 33, 20)[32].ids)

    def samples(client: Client, n: int, **seed: int) -> list[list[int]]:
        params = {"temperature": 1.5, "max_new_tokens": 20, "n": n, **seed}
        replies = client.http.post("/generate", json={"input_ids": ids, "sampling_params": params}).json()
        return [reply["output_ids"] for reply in (replies if isinstance(replies, list) else [replies])]

    want = samples(pair.plain, 3, sampling_seed=7)
    assert samples(pair.tree, 3, sampling_seed=7) == want
    assert samples(pair.tree, 3, sampling_seed=7) == want
    assert len({tuple(sample) for sample in want}) == 3
    assert samples(pair.tree, 1, sampling_seed=7) == want[:1]
    unseeded = samples(pair.tree, 3) + samples(pair.tree, 3)
    assert len({tuple(sample) for sample in unseeded}) == 6, "unseeded samples repeat"


def test_openai_seed(pair: Pair) -> None:
    body = {
        "model": "any",
        "messages": [{"role": "user", "content": "Name a colour, then a fruit."}],
        "max_tokens": 20,
        "temperature": 1.5,
    }

    def text(client: Client, **more: Any) -> str:
        reply = client.http.post("/v1/chat/completions", json={**body, **more})
        reply.raise_for_status()
        return reply.json()["choices"][0]["message"]["content"]

    want = text(pair.plain, seed=11)
    assert text(pair.tree, seed=11) == want
    assert text(pair.tree, seed=12) != want
    # One id for two unseeded requests does not make them one sample.
    assert text(pair.tree, rid="mine") != text(pair.tree, rid="mine")


def test_a_prefix_from_the_cache_drafts_as_well(pair: Pair, tokenizer: Any) -> None:
    """The drafter's KV of a cached prefix is in the same slots as the target's."""
    requests = chat_requests(tokenizer, 6, NEW_TOKENS)
    reply = pair.tree.http.post("/flush_cache", params={"timeout": 60})
    assert reply.status_code == 200, reply.text
    cold, warm = pair.tree.generate(requests, 3), pair.tree.generate(requests, 3)
    assert [reply["output_ids"] for reply in warm] == [reply["output_ids"] for reply in cold]
    assert min(reply["meta_info"]["cached_tokens"] for reply in warm) > 20
    lengths = accept_length(cold), accept_length(warm)
    print(f"accept length without a hit {lengths[0]:.3f}, with one {lengths[1]:.3f}")
    assert lengths[0] > 1.5
    assert lengths[1] >= 0.97 * lengths[0]


def test_served_drafter_equals_the_reference(pair: Pair, target: Path, drafter: Path, tokenizer: Any) -> None:
    """Top-K log-probabilities from the server against ``dflash==0.1.0`` on Hugging Face's target."""
    from transformers import AutoModelForCausalLM

    reference = pytest.importorskip("dflash.model", reason="make test installs dflash==0.1.0")
    requests = chat_requests(tokenizer, PROMPTS, NEW_TOKENS)
    answer = pair.tree.generate(requests[:1], 1)[0]["output_ids"]
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    stock = reference.DFlashDraftModel.from_pretrained(drafter, dtype=torch.float32)
    text = torch.tensor([list(requests[0].ids) + answer])
    with torch.inference_mode():
        hidden = model(text, output_hidden_states=True).hidden_states
    features = torch.cat([hidden[layer + 1] for layer in stock.target_layer_ids], dim=-1)

    compared, worst = 0, 0.0
    for file in sorted(pair.tap.iterdir()):
        record = torch.load(file, weights_only=True)
        start = record["prefix"]
        if record["prompt"] != list(requests[0].ids) or compared == STEPS_COMPARED:
            continue
        assert record["anchor"] == int(text[0, start])
        block = torch.full((1, stock.block_size), stock.mask_token_id)
        block[0, 0] = record["anchor"]
        with torch.inference_mode():
            states = stock(
                target_hidden=features[:, :start],
                noise_embedding=model.get_input_embeddings()(block),
                position_ids=torch.arange(start + stock.block_size)[None],
            )[0, 1:]
            logprobs = torch.log_softmax(model.lm_head(states), -1)
        expected = logprobs.gather(1, record["ids"])
        assert torch.equal(record["ids"][:, 0], logprobs.argmax(-1))
        worst = max(worst, float((expected - record["logprobs"]).abs().max()))
        compared += 1
    print(f"{compared} steps, largest difference {worst:.2e}")
    assert compared == STEPS_COMPARED
    assert worst < 2e-3


@pytest.mark.parametrize("seed", [1, 2])
def test_outputs_do_not_depend_on_the_width(seed: int, pair: Pair, tokenizer: Any) -> None:
    """Another width every step, plain ones among them, in mid-request and in mixed batches."""
    requests = chat_requests(tokenizer, 40 + 8 * seed, 24)[32 + 8 * seed :]
    with pair.tree.width(f"random:{seed}"):
        want, got = of_both(pair, requests, 4)
        assert got == want
        with ThreadPoolExecutor(1) as pool:
            want_later = pool.submit(seeded, pair.plain, requests, 8)
            assert seeded(pair.tree, requests, 8) == want_later.result()
        penalty = (
            {"frequency_penalty": 0.8} if seed == 1 else {"repetition_penalty": 1.3, "min_new_tokens": 20}
        )
        want, got = of_both(pair, requests[:4], 4, **penalty)
        assert got == want
        steps = pair.tree.info().internal_states[0]["dflash"]["width"]["steps"]
    assert len(steps) > 20, "the widths did not change"
    assert "1x1" in steps


def test_plain_steps_keep_the_drafter_warm(pair: Pair, tokenizer: Any) -> None:
    """The drafter's K and V, and what it proposes, after 200 plain steps and where no step was plain."""
    (request,) = chat_requests(tokenizer, 33, 200)[32:]
    drafted = {}
    for name, setting in (("plain", "1x1"), ("tree", "fixed"), ("prefill", None)):
        assert pair.tree.http.post("/flush_cache", params={"timeout": 60}).status_code == 200
        if setting is not None:
            with pair.tree.width(setting):
                answer = pair.tree.generate([request], 1, ignore_eos=True)[0]["output_ids"]
        text = Request((*request.ids, *answer[:190]), 8)
        before = set(pair.tap.iterdir())
        keys = pair.tap.parent / "keys"
        keys.touch()
        reply = pair.tree.generate([text], 1, ignore_eos=True)[0]
        keys.unlink()
        assert reply["output_ids"] == answer[190:198]
        hit = reply["meta_info"]["cached_tokens"]
        assert hit >= len(text.ids) - 1 if setting else hit == 0
        first = min(set(pair.tap.iterdir()) - before)
        drafted[name] = torch.load(first, weights_only=True)
    for other in ("plain", "prefill"):
        assert drafted[other]["prefix"] == drafted["tree"]["prefix"] >= 190
        # Of the largest value. A prefill's attention adds up in another order, and so does a path off the
        # spine that crosses a tile of keys (platform/attention_ops.py).
        close = 1e-5 * float(drafted["tree"]["keys"].abs().max())
        keys_of = {name: drafted[name]["keys"] for name in (other, "tree")}
        torch.testing.assert_close(keys_of[other], keys_of["tree"], atol=close, rtol=0)
        if other == "plain":  # before any tree can have crossed one
            keys_of = {name: keys[:, :, : KEY_TILE - NODES] for name, keys in keys_of.items()}
            torch.testing.assert_close(keys_of[other], keys_of["tree"], atol=1e-5, rtol=1e-5)
        assert torch.equal(drafted[other]["ids"][:, 0], drafted["tree"]["ids"][:, 0])
        said, want = drafted[other]["logprobs"], drafted["tree"]["logprobs"]
        torch.testing.assert_close(said, want, atol=1e-5, rtol=1e-5)
    marker = pair.tree.info().marker
    assert marker is not None
    assert (marker.model_extra or {})["drafter_fallbacks"] == 0, "a plain step is no broken draft"


@pytest.mark.slow
def test_health_while_a_long_prompt_is_read(pair: Pair) -> None:
    """An orchestrator asks every few seconds and kills what says 503."""
    prompt = Request(tuple(range(100, 7100)), 2)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(pair.tree.generate, [prompt], 1)
        answers: list[int] = []
        while not job.done():
            answers.append(pair.tree.http.get("/health").status_code)
        assert job.result()[0]["meta_info"]["prompt_tokens"] == len(prompt.ids)
    assert len(answers) >= 3, "the prompt was read too fast for this test"
    assert set(answers) == {200}
