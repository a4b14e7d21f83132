"""New weights at run time: outputs follow the target's, the drafter's only change the speed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.server.support import Client, Pair, Request, Serving, body_of, tiny_args

pytestmark = pytest.mark.server

SPEC = tiny.TargetSpec(tie_word_embeddings=False)


@dataclass
class Folders:
    target: Path
    drafter: Path
    smaller_block: Path


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Other random weights of the tiny pair's shapes, and a drafter of another block size."""
    folder = tmp_path_factory.mktemp("new")
    other = tiny.DrafterSpec(block_size=4)
    return Folders(
        tiny.build_target(folder / "target", SPEC, dtype=torch.float32, seed=7),
        tiny.build_drafter(folder / "drafter", SPEC, dtype=torch.float32, seed=8),
        tiny.build_drafter(folder / "smaller", SPEC, other, dtype=torch.float32, seed=9),
    )


def update(client: Client, folder: Path) -> tuple[bool, str]:
    reply = client.http.post("/update_weights_from_disk", json={"model_path": str(folder)})
    return reply.json()["success"], reply.json()["message"]


def checksums(client: Client) -> tuple[dict[str, str], dict[str, str]]:
    """Of the target's tensors and of the drafter's."""
    reply = client.http.post("/weights_checker", json={"action": "checksum"})
    assert reply.status_code == 200, reply.text
    (rank,) = reply.json()["ranks"]
    sums = rank["checksums"]
    drafter = {name: value for name, value in sums.items() if name.startswith("draft.")}
    return {name: value for name, value in sums.items() if name not in drafter}, drafter


@contextmanager
def restored(servers: Pair, pair: tuple[Path, Path]) -> Iterator[None]:
    try:
        yield
    finally:
        update(servers.plain, pair[0])
        assert update(servers.tree, pair[0])[0]
        assert update(servers.tree, pair[1])[0]


def bodies() -> list[dict]:
    draw = random.Random(11)
    return [
        body_of(Request(tuple(draw.randrange(3, 250) for _ in range(30)), 40), ignore_eos=True)
        for _ in range(4)
    ]


def test_a_new_target_then_a_new_drafter(
    new: Folders, tiny_servers: Pair, tiny_pair: tuple[Path, Path]
) -> None:
    tree = tiny_servers.tree
    old, _ = tiny_servers.compare(bodies(), 4)  # the prefixes are cached now
    target, drafter = checksums(tree)
    assert target
    assert drafter
    with restored(tiny_servers, tiny_pair):
        assert update(tiny_servers.plain, new.target)[0]
        done, message = update(tree, new.target)
        assert done
        assert "keeps its weights" in message
        want, got = tiny_servers.compare(bodies(), 4)
        assert [reply["meta_info"]["cached_tokens"] for reply in got] == [0] * 4
        assert all(a["output_ids"] != b["output_ids"] for a, b in zip(old, want, strict=True))
        new_target, same_drafter = checksums(tree)
        assert new_target != target
        assert same_drafter == drafter, "SGLang's update overwrote the drafter's layers"

        assert update(tree, new.drafter) == (True, "Succeeded to update model weights.")
        tiny_servers.compare(bodies(), 4)
        same_target, new_drafter = checksums(tree)
        assert same_target == new_target
        assert all(value != drafter[name] for name, value in new_drafter.items())
    back, _ = tiny_servers.compare(bodies(), 4)
    assert [reply["output_ids"] for reply in back] == [reply["output_ids"] for reply in old]
    assert checksums(tree) == (target, drafter)


@pytest.mark.slow
def test_a_fresh_plain_server_says_the_same(
    new: Folders, tiny_servers: Pair, tiny_pair: tuple[Path, Path], serving: Serving
) -> None:
    with serving("fresh", tiny_args(new.target)) as fresh, restored(tiny_servers, tiny_pair):
        assert update(tiny_servers.tree, new.target)[0]
        Pair(fresh, tiny_servers.tree).compare(bodies(), 4)


def test_a_drafter_that_does_not_fit_is_refused(new: Folders, tiny_servers: Pair) -> None:
    before = checksums(tiny_servers.tree)
    done, message = update(tiny_servers.tree, new.smaller_block)
    assert not done
    assert "restart the server with the new drafter" in message
    assert checksums(tiny_servers.tree) == before
    tiny_servers.compare(bodies(), 4)
