"""Server fixtures. A start costs 25-60 s: modules share servers, and each starts what it needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from sglang_dflash.client import fast_start
from sglang_dflash.client.ports import free_port
from sglang_dflash.client.server import Server
from sglang_dflash.models.fetch import fetch
from sglang_dflash.models.registry import SMOLLM2
from tests import tiny
from tests.server.support import PINNED, ROOT, RUNNING, Client, Pair, Serving, dead, dflash_args, tiny_args


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Generator[None, Any, Any]:
    """A failed test names the servers that died: "connection refused" does not."""
    report = yield
    if report.failed:
        report.sections.extend(dead(RUNNING))
    return report


@pytest.fixture(scope="session")
def target() -> Path:
    """The embedded target, fetched once per machine."""
    return fetch(SMOLLM2)


@pytest.fixture(scope="session")
def drafter() -> Path:
    """The drafter that ships with the package, or the one named by DFLASH_TEST_DRAFTER."""
    return Path(os.environ.get("DFLASH_TEST_DRAFTER", SMOLLM2.drafter_dir))


@pytest.fixture(scope="session")
def tokenizer(target: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(target)


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny random target (float32, so that near-ties do not occur) and a random drafter for it."""
    import torch

    folder = tmp_path_factory.mktemp("tiny")
    spec = tiny.TargetSpec(tie_word_embeddings=False)
    target = tiny.build_target(folder / "target", spec, dtype=torch.float32)
    drafter = tiny.build_drafter(folder / "drafter", spec, dtype=torch.float32)
    return target, drafter


@pytest.fixture(scope="session")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Serving:
    """``with serving(name, args, **env) as client``: a server for the length of the block."""
    logs = tmp_path_factory.mktemp("logs")
    quick = {fast_start.VARIABLE: fast_start.disabled_models(fast_start.EMBEDDED)}

    @contextmanager
    def serve(name: str, args: list[str], **env: str | None) -> Iterator[Client]:
        port = free_port()
        control = logs / f"{port}-{name}.width"
        control.write_text(PINNED)
        width: dict[str, str | None] = {"SGLANG_DFLASH_WIDTH": f"control:{control}"}
        with Server(args, port=port, log=logs / f"{port}-{name}.log", env=quick | width | env) as server:
            RUNNING.append(server)
            try:
                yield Client(server, control)
            finally:
                RUNNING.remove(server)

    return serve


@pytest.fixture(scope="module")
def launch(serving: Serving) -> Iterator[Callable[..., Client]]:
    """``launch(name, args, **env)`` starts a server that lives as long as the test module."""
    with ExitStack() as stack:
        yield lambda name, args, **env: stack.enter_context(serving(name, args, **env))


@pytest.fixture(scope="session")
def tiny_plain(serving: Serving, tiny_pair: tuple[Path, Path]) -> Iterator[Client]:
    """Plain decoding without overlap, where SGLang's penalties count every token."""
    more = ["--disable-overlap-schedule", "--tool-call-parser", "qwen", "--enable-custom-logit-processor"]
    with serving("tiny-plain", tiny_args(tiny_pair[0], *more), PYTHONPATH=str(ROOT)) as client:
        yield client


@pytest.fixture(scope="session")
def oracle_env() -> dict[str, str]:
    """Candidates come from the request itself (tests/server/oracle.py)."""
    return {"SGLANG_DFLASH_CANDIDATES": "tests.server.oracle:candidates", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="session")
def tiny_tree(serving: Serving, tiny_pair: tuple[Path, Path]) -> Iterator[Client]:
    """Trees that draft what the request says, with overlap.

    A request can also ask for a fault (tests/server/faults.py).
    """
    target, drafter = tiny_pair
    more = ["--page-size", "1", "--tool-call-parser", "qwen", "--enable-metrics"]
    more += ["--enable-custom-logit-processor", "--enable-streaming-session"]
    with serving(
        "tiny-tree",
        tiny_args(target, *dflash_args(drafter, 24), *more),
        SGLANG_DFLASH_CANDIDATES="tests.server.faults:candidates",
        PYTHONPATH=str(ROOT),
    ) as client:
        yield client


@pytest.fixture(scope="session")
def tiny_servers(tiny_plain: Client, tiny_tree: Client) -> Pair:
    return Pair(tiny_plain, tiny_tree)
