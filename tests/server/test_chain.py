"""The same tokens in the same steps: top-1 paths as SGLang's own chain, trees as judged offline.

In float32, without the request's own text: in bfloat16 two drafts that lie close together come out one way
in the chain's attention and the other way in the tree's, and a step more or less follows. Two servers, one
alive at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sglang_dflash.cli.main import main
from sglang_dflash.drafter import read_config
from tests.server.support import ROOT, Client, Request, Serving, chat_requests, dflash_args, embedded_args

pytestmark = pytest.mark.server

PENALTIES = {"frequency_penalty": 1.9, "presence_penalty": 0.9, "repetition_penalty": 1.8}


@dataclass
class Walk:
    """A server whose trees have as many nodes as the block has rows: chains, unless ``free`` exists."""

    client: Client
    free: Path


@pytest.fixture(scope="module")
def args(target: Path, drafter: Path) -> list[str]:
    return embedded_args(target, "float32", *dflash_args(drafter, read_config(drafter).block))


@dataclass
class Said:
    """What a server answers: freely, with penalties, and with a stop token that has to wait."""

    free: list[dict[str, Any]]
    penalised: list[dict[str, Any]]
    early: dict[str, Any]

    @classmethod
    def by(cls, client: Client, requests: list[Request]) -> Said:
        free = client.generate(requests, 1)
        penalised = client.generate(requests[:3], 1, **PENALTIES)
        stop = free[0]["output_ids"][6]
        early = client.generate(requests[:1], 1, stop_token_ids=[stop], min_new_tokens=16)[0]
        return cls(free, penalised, early)


@pytest.fixture(scope="module")
def chain(serving: Serving, args: list[str], requests: list[Request]) -> Said:
    # Without our general plugin, the built-in worker serves on our CPU platform.
    with serving("chain", args, SGLANG_PLUGINS="dflash_cpu") as client:
        assert client.info().marker is None
        return Said.by(client, requests)


@pytest.fixture(scope="module")
def walk(serving: Serving, args: list[str], chain: Said, tmp_path_factory: Any) -> Iterator[Walk]:
    """The same drafts, as a tree: of a drafter with a selector that one's walk."""
    free = tmp_path_factory.mktemp("walk") / "free"
    env = {"SGLANG_DFLASH_CANDIDATES": "tests.server.walk:candidates", "PYTHONPATH": str(ROOT)}
    with serving("walk", args, SGLANG_DFLASH_RECALL="0", DFLASH_TEST_FREE=str(free), **env) as client:
        yield Walk(client, free)


@pytest.fixture(scope="module")
def requests(tokenizer: Any) -> list[Request]:
    return chat_requests(tokenizer, 12, 32)


def test_a_tree_of_the_spine_alone_is_the_builtin_chain(
    chain: Said, walk: Walk, requests: list[Request], drafter: Path
) -> None:
    block = read_config(drafter).block
    assert f"draft trees on. nodes={block} block={block}" in walk.client.server.output()
    tree = Said.by(walk.client, requests)
    for left, right in zip(chain.free, tree.free, strict=True):
        assert left["output_ids"] == right["output_ids"]
        assert left["meta_info"]["spec_verify_ct"] == right["meta_info"]["spec_verify_ct"]
    # What SGLang's chain says with penalties is what it says without, and it stops too soon.
    assert chain.early["meta_info"]["completion_tokens"] <= 7
    assert tree.early["meta_info"]["completion_tokens"] >= 16
    for left, right, free in zip(chain.penalised, tree.penalised, chain.free, strict=False):
        assert left["output_ids"] == free["output_ids"]
        assert right["output_ids"] != free["output_ids"]


def test_eval_says_offline_what_is_served(walk: Walk, drafter: Path, tmp_path: Path) -> None:
    """``sglang-dflash eval --server``: accept lengths of the same answers."""
    numbers, nodes = tmp_path / "numbers.json", str(read_config(drafter).block)
    args = ["--prompts", str(ROOT / "benchmarks" / "prompts.jsonl"), "--limit", "12", "--max-new", "48"]
    args += ["--budgets", nodes, "--server", walk.client.server.url, "--json-out", str(numbers)]
    walk.free.touch()
    assert main(["eval", *args]) == 0
    walk.free.unlink()
    served = json.loads(numbers.read_text())["served"]
    print(f"\n{served}")
    assert served["policy"] == f"tree-{nodes}"
    assert served["answers"] == served["same_answer"] == 12
    assert set(served["accept_length"]) == set(served["offline"]) == {"all", "chat", "code", "equal"}
    for name, offline in served["offline"].items():
        assert abs(served["accept_length"][name] / offline - 1) <= 0.012, "more than one pass in 91"
