"""Custom logit processors decide on trees what they decide in plain decoding."""

from __future__ import annotations

import random
from typing import Any

import pytest
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor, DisallowedTokensLogitsProcessor

from tests.server import logit_processors as those
from tests.server.support import Pair, Request, body_of

pytestmark = pytest.mark.server

LENGTH = 24


def bodies_of(
    kind: type[CustomLogitProcessor], params: list[dict[str, Any]], seed: int
) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    bodies = []
    for custom in params:
        ids = [draw.randrange(3, 250) for _ in range(draw.randrange(4, 20))]
        if "thinking_budget" in custom:
            ids[-2] = those.Budget.THINKING_START_TOKEN_ID
        body = body_of(Request(tuple(ids), LENGTH), ignore_eos=True, custom_params=custom)
        bodies.append(body | {"custom_logit_processor": kind.to_str()})
    return bodies


PLACES = [{"at": at} for at in range(2, 20)]
BUDGETS = [{"thinking_budget": budget} for budget in range(10)]
GRAMS = [{"ngram_size": size, "window_size": 30} for size in (1, 2, 3)]

#: class, its parameters, the least accept length: 1 where only the root's row can be shown.
CASES: list[tuple[type[CustomLogitProcessor], list[dict[str, Any]], float]] = [
    (those.WriteAt, PLACES, 1),
    (those.WriteAtHidden, PLACES, 1),
    (those.Nth, [{"at": at} for at in range(6)], 1),
    (those.WriteAtDeclared, PLACES, 2.5),
    (those.Budget, BUDGETS, 2.5),
    (those.NoRepeat, GRAMS, 2.5),
    (those.Forbid, [{"at": [token, token + 40]} for token in range(5, 250, 40)], 2.5),
    (DisallowedTokensLogitsProcessor, [{"token_ids": list(range(3, 200))}] * 4, 2.5),
]


@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize(("kind", "params", "least"), CASES, ids=[kind.__name__ for kind, _, _ in CASES])
def test_the_answer_is_plain_decodings(
    kind: type[CustomLogitProcessor],
    params: list[dict[str, Any]],
    least: float,
    batch: int,
    tiny_servers: Pair,
) -> None:
    bodies = bodies_of(kind, params, seed=batch)
    _, got = tiny_servers.compare(bodies, batch, at_least=least)
    if least == 1:
        meta = [reply["meta_info"] for reply in got]
        assert all(entry["spec_verify_ct"] == entry["completion_tokens"] - 1 for entry in meta)
    if "at" in params[0] and "WriteAt" in kind.__name__:
        assert all(reply["output_ids"][custom["at"]] == 17 for reply, custom in zip(got, params, strict=True))
    if kind is those.Budget:
        for reply, custom in zip(got, params, strict=True):
            said = max(0, custom["thinking_budget"] - 1)  # the prompt goes on by one token
            assert reply["output_ids"][said : said + 2] == [10, 62]


def test_all_kinds_in_one_batch_beside_requests_without(tiny_servers: Pair) -> None:
    bodies = [body for kind, params, _ in CASES for body in bodies_of(kind, params[3:5], seed=9)]
    bodies += [body_of(Request((5, 6, seed), LENGTH), ignore_eos=True) for seed in range(4)]
    random.Random(1).shuffle(bodies)
    tiny_servers.compare(bodies, 8, at_least=1.2)


def test_penalties_and_a_processor(tiny_servers: Pair) -> None:
    bodies = bodies_of(those.WriteAtDeclared, PLACES[:6], seed=4)
    for body in bodies:
        body["sampling_params"]["frequency_penalty"] = 0.7
    tiny_servers.compare(bodies, 4)


def test_one_that_cannot_be_loaded_is_refused(tiny_servers: Pair) -> None:
    body = bodies_of(those.WriteAt, PLACES[:1], seed=1)[0]
    bad = tiny_servers.tree.http.post("/generate", json=body | {"custom_logit_processor": "x"})
    assert bad.status_code == 400
    assert "cannot be loaded" in bad.json()["error"]["message"]
    assert tiny_servers.tree.post(**body)["output_ids"][2] == 17
