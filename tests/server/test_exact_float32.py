"""float32 has no near-ties: every output must equal plain decoding's, token for token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.server.support import Client, chat_requests, dflash_args, embedded_args

pytestmark = pytest.mark.server

PROMPTS = 12
NEW_TOKENS = 40


@pytest.mark.parametrize("batch", [1, 4])
def test_outputs_are_identical(batch: int, servers: tuple[Client, Client], tokenizer: Any) -> None:
    plain, tree = servers
    requests = chat_requests(tokenizer, PROMPTS, NEW_TOKENS)
    requests = requests[: PROMPTS // 2] if batch == 1 else requests[PROMPTS // 2 :]
    want = [reply["output_ids"] for reply in plain.generate(requests, batch)]
    got = [reply["output_ids"] for reply in tree.generate(requests, batch)]
    assert got == want


@pytest.fixture(scope="module")
def servers(launch: Callable[..., Client], target: Path, drafter: Path) -> tuple[Client, Client]:
    plain = launch("plain32", embedded_args(target, "float32"))
    tree = launch("tree32", embedded_args(target, "float32", *dflash_args(drafter, 16)))
    return plain, tree
