"""A prefill and a decode server (prefill/decode disaggregation), over Mooncake's TCP transport."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sglang_dflash.client.ports import free_port
from tests.server.kept import prefix_cache
from tests.server.support import ROOT, Client, Pair, Request, accept_length, body_of, dflash_args, tiny_args

pytestmark = [pytest.mark.server, pytest.mark.slow]


class Halves(Client):
    """Both servers get every request, as SGLang's router would send it; the decode server answers."""

    def __init__(self, prefill: Client, decode: Client, bootstrap_port: int) -> None:
        super().__init__(decode.server)
        self.prefill, self.bootstrap_port = prefill, bootstrap_port
        self.rooms = itertools.count(1)

    def post(self, **body: Any) -> dict[str, Any]:
        room = {"bootstrap_host": "127.0.0.1", "bootstrap_port": self.bootstrap_port}
        body |= room | {"bootstrap_room": next(self.rooms)}
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(self.prefill.post, **body)
            reply = super().post(**body)
            first.result()
        return reply


@pytest.fixture(scope="module")
def halves(launch: Callable[..., Client], tiny_pair: tuple[Path, Path], oracle_env: dict[str, str]) -> Halves:
    pytest.importorskip(
        "mooncake.engine", reason="pip install mooncake-transfer-engine-non-cuda (it needs libibverbs)"
    )
    target, drafter = tiny_pair
    port = free_port()
    transfer = ["--disaggregation-transfer-backend", "mooncake", "--disaggregation-bootstrap-port", str(port)]
    # SGLang's other backup of retracted requests needs memory that a GPU has pinned.
    transfer += ["--disaggregation-decode-retraction-backup", "cpu_tensor"]
    args = [*tiny_args(target, *dflash_args(drafter, 24)), "--page-size", "1", *transfer]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = oracle_env | {"MC_FORCE_TCP": "1", "PYTHONPATH": os.pathsep.join(paths)}
    prefill, decode = (
        launch(mode, [*args, "--disaggregation-mode", mode], **env) for mode in ("prefill", "decode")
    )
    return Halves(prefill, decode, port)


def bodies(**params: Any) -> list[dict[str, Any]]:
    draw = random.Random(22)
    return [
        body_of(Request(tuple(draw.randrange(3, 250) for _ in range(20 + i)), 40), **params) for i in range(6)
    ]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"frequency_penalty": 0.7},
        {"regex": "([a-z][0-9]){12}"},
        {"temperature": 1.0, "sampling_seed": 5},
    ],
    ids=["free", "penalised", "grammar", "seeded"],
)
@pytest.mark.parametrize("batch", [1, 4])
def test_two_halves_say_what_one_server_says(
    batch: int, params: dict[str, Any], halves: Halves, tiny_plain: Client
) -> None:
    _, got = Pair(tiny_plain, halves).compare(bodies(**params), batch)
    print(f"accept length {accept_length(got):.2f}")


def test_the_next_turn_finds_the_accepted_rows(halves: Halves, tiny_plain: Client) -> None:
    """The decode server wrote the first turn's keys, the prefill server reads the whole text again."""
    draw = random.Random(23)
    for length in range(1, 25):
        request = Request(tuple(draw.randrange(3, 250) for _ in range(20 + length)), 40)
        answer = tiny_plain.generate([request], 1, ignore_eos=True)[0]["output_ids"]
        turns = prefix_cache(halves, tiny_plain, request, answer, length, [draw.randrange(3, 250)] * 3)
        assert turns.first == answer[:length]
        assert turns.second == turns.want, length


def test_the_drafters_cache_comes_along(halves: Halves, tiny_tree: Client) -> None:
    """Without told answers both draft from their own drafter, whose K and V of the prompt were computed
    here by the prefill server and there by the same one; equal steps need equal caches.
    """
    one = tiny_tree.post_all(bodies(), 1)
    two = halves.post_all(bodies(), 1)
    passes = [[reply["meta_info"]["spec_verify_ct"] for reply in replies] for replies in (one, two)]
    assert passes[0] == passes[1]
