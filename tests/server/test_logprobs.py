"""Log-probabilities of trees are plain decoding's: per accepted token, in order."""

from __future__ import annotations

from typing import Any

import pytest

from tests import tiny
from tests.server.support import Pair, Request, body_of

pytestmark = pytest.mark.server

REQUESTS = [
    Request(tuple(tiny.tokens_of(text)), 30) for text in (b"first", b"the second", b"3rd", b"and four")
]
TOLERANCE = 1e-5
FIELDS = (
    *("input_token_logprobs", "output_token_logprobs"),
    *("input_top_logprobs", "output_top_logprobs"),
    *("input_token_ids_logprobs", "output_token_ids_logprobs"),
)


def close(want: Any, got: Any) -> None:
    """Nested lists of (log-probability, token id, text), where the first may be None."""
    if isinstance(want, list):
        assert len(want) == len(got)
        for left, right in zip(want, got, strict=True):
            close(left, right)
    elif isinstance(want, float):
        assert got == pytest.approx(want, abs=TOLERANCE)
    else:
        assert got == want


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    "params",
    [
        {"ignore_eos": True},
        {"ignore_eos": True, "frequency_penalty": 0.7, "presence_penalty": 0.3},
        {"regex": "[a-f]{12}"},
    ],
    ids=["free", "penalised", "grammar"],
)
def test_every_kind_of_logprob(params: dict[str, Any], batch: int, tiny_servers: Pair) -> None:
    bodies = [
        body_of(request, **params)
        | {
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": 3,
            "token_ids_logprob": [5, 300, 17],
            # A cached prefix would shorten the input's log-probabilities.
            "extra_key": f"{batch}-{sorted(params)}",
        }
        for request in REQUESTS
    ]
    want, got = tiny_servers.compare(bodies, batch)
    for request, left, right in zip(REQUESTS, want, got, strict=True):
        for name in FIELDS:
            close(left["meta_info"][name], right["meta_info"][name])
        tokens = [entry[1] for entry in right["meta_info"]["output_token_logprobs"]]
        assert tokens == right["output_ids"]
        assert len(right["meta_info"]["input_token_logprobs"]) == len(request.ids)
        assert {len(entry) for entry in right["meta_info"]["output_top_logprobs"]} == {3}


def test_only_some_requests_of_a_batch_ask(tiny_servers: Pair) -> None:
    """Each asks for another number of them, or for none."""
    asks: list[dict[str, Any]] = [
        {},
        {"return_logprob": True},
        {"return_logprob": True, "top_logprobs_num": 5},
        {"return_logprob": True, "token_ids_logprob": [9]},
    ]
    bodies = [body_of(request, ignore_eos=True) | ask for request, ask in zip(REQUESTS, asks, strict=True)]
    want, got = tiny_servers.compare(bodies, 4)
    for left, right, ask in zip(want, got, asks, strict=True):
        assert ("output_token_logprobs" in right["meta_info"]) == bool(ask)
        for name in FIELDS:
            close(left["meta_info"].get(name), right["meta_info"].get(name))


def test_logprobs_end_where_the_text_ends(tiny_servers: Pair) -> None:
    """A stop in mid-path cuts the log-probabilities too."""
    free = tiny_servers.plain.post_all([body_of(request, ignore_eos=True) for request in REQUESTS], 4)
    answers = [reply["output_ids"] for reply in free]
    bodies = [
        body_of(request, stop_token_ids=[answer[8]]) | {"return_logprob": True, "top_logprobs_num": 2}
        for request, answer in zip(REQUESTS, answers, strict=True)
    ]
    _, got = tiny_servers.compare(bodies, 4, answers)
    for reply in got:
        assert len(reply["meta_info"]["output_token_logprobs"]) == len(reply["output_ids"]) <= 9
        assert len(reply["meta_info"]["output_top_logprobs"]) == len(reply["output_ids"])
