"""Start real servers for tests and talk to their native ``/generate`` endpoint in token ids."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from sglang_dflash.client.info import ServerInfo
from sglang_dflash.client.server import Server

#: The width of tree servers that no test gives another: where the width followed the load, a test of trees
#: could run without one. ``DFLASH_TEST_WIDTH=random:1`` runs them at another width every step instead;
#: accept lengths then say nothing.
PINNED = os.environ.get("DFLASH_TEST_WIDTH", "fixed")
ROOT = Path(__file__).resolve().parents[2]
COMMON = ["--sleep-on-idle", "--log-level", "info", "--skip-server-warmup"]


@dataclass(frozen=True)
class Request:
    """One greedy request: token ids in, token ids out."""

    ids: tuple[int, ...]
    max_new_tokens: int


def body_of(request: Request, **params: Any) -> dict[str, Any]:
    """A greedy ``/generate`` body; ``params`` are sampling parameters."""
    sampling = {"temperature": 0, "max_new_tokens": request.max_new_tokens, **params}
    return {"input_ids": list(request.ids), "sampling_params": sampling}


def with_answer(body: dict[str, Any], answer: Sequence[int]) -> dict[str, Any]:
    """The body for a server whose candidates come from ``tests.server.oracle``."""
    custom = body["sampling_params"].get("custom_params", {}) | {"answer": list(answer)}
    return body | {"sampling_params": body["sampling_params"] | {"custom_params": custom}}


#: What a client sees of a reply and what must not depend on how it was decoded.
META = ("finish_reason", "prompt_tokens", "completion_tokens")


def visible(reply: dict[str, Any]) -> dict[str, Any]:
    return {"text": reply["text"], "output_ids": reply["output_ids"]} | {
        name: reply["meta_info"][name] for name in META
    }


def accept_length(replies: Sequence[dict[str, Any]]) -> float:
    """Tokens per verify pass; a request's first token comes from its prefill. Unknown at random widths."""
    if PINNED != "fixed":
        return float("inf")
    tokens = sum(reply["meta_info"]["completion_tokens"] - 1 for reply in replies)
    return tokens / max(1, sum(reply["meta_info"].get("spec_verify_ct", 0) for reply in replies))


@dataclass(frozen=True)
class Pair:
    """Plain decoding and a tree server that is told plain decoding's answers."""

    plain: Client
    tree: Client

    def compare(
        self,
        bodies: Sequence[dict[str, Any]],
        batch: int,
        answers: Sequence[Sequence[int]] | None = None,
        at_least: float = 2.5,
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Ask both for the same, compare all that a client sees, return both servers' replies.

        Args:
            bodies: of ``/generate``.
            batch: requests in flight at the tree server.
            answers: what the tree is to draft, where that is more than plain decoding's reply (a
                draft that goes on past a stop).
            at_least: accept length below which the drafts were not accepted and nothing was tested.
        """
        want = self.plain.post_all(bodies, 4)
        drafts = answers or [reply["output_ids"] for reply in want]
        told = [with_answer(body, draft) for body, draft in zip(bodies, drafts, strict=True)]
        got = self.tree.post_all(told, batch)
        assert [visible(reply) for reply in got] == [visible(reply) for reply in want]
        assert accept_length(got) >= at_least
        return want, got


def embedded_args(target: Path, dtype: str, *more: str) -> list[str]:
    return ["--model-path", str(target), "--dtype", dtype, "--max-total-tokens", "24576", *COMMON, *more]


def tiny_args(target: Path, *more: str) -> list[str]:
    return ["--model-path", str(target), "--dtype", "float32", "--max-total-tokens", "4096", *COMMON, *more]


def dflash_args(drafter: Path, nodes: int | None = None) -> list[str]:
    width = [] if nodes is None else ["--speculative-num-draft-tokens", str(nodes)]
    return ["--speculative-algorithm", "DFLASH", "--speculative-draft-model-path", str(drafter), *width]


class Client:
    """A server's native endpoint.

    ``generate`` keeps ``batch`` requests in flight and returns the replies in order.

    Args:
        control: the file that its width follows, where it follows one.
    """

    def __init__(self, server: Server, control: Path | None = None) -> None:
        self.server, self.control = server, control
        self.http = httpx.Client(base_url=server.url, timeout=600.0, trust_env=False)

    def post(self, **body: Any) -> dict[str, Any]:
        reply = self.http.post("/generate", json=body)
        reply.raise_for_status()
        return reply.json()

    def post_all(self, bodies: Sequence[dict[str, Any]], batch: int) -> list[dict[str, Any]]:
        """The replies in order, with ``batch`` requests in flight."""
        with ThreadPoolExecutor(batch) as pool:
            return list(pool.map(lambda body: self.post(**body), bodies))

    @contextmanager
    def width(self, setting: str) -> Iterator[None]:
        """Another setting of the width for the length of the block; the server must run under ``control``."""
        assert self.control is not None, "start the server with a control file"
        self.control.write_text(setting)
        try:
            yield
        finally:
            self.control.write_text(PINNED)

    def generate(self, requests: Sequence[Request], batch: int, **params: Any) -> list[dict[str, Any]]:
        return self.post_all([body_of(request, **params) for request in requests], batch)

    def info(self) -> ServerInfo:
        reply = self.http.get("/server_info")
        reply.raise_for_status()
        return ServerInfo.model_validate(reply.json())


#: Servers that the fixtures started and did not stop yet.
RUNNING: list[Server] = []


def dead(servers: Sequence[Server], lines: int = 25) -> list[tuple[str, str]]:
    """(title, end of the log) of each server that is gone: for lack of memory often, which no client sees."""
    return [
        (
            f"the server {server.log.stem} died (killed without a word of its own: out of memory?)",
            "\n".join(server.output().splitlines()[-lines:]),
        )
        for server in servers
        if not server.alive()
    ]


#: What the ``serving`` fixture gives.
Serving = Callable[..., AbstractContextManager[Client]]


def chat_requests(tokenizer: Any, count: int, max_new_tokens: int) -> list[Request]:
    """The first ``count`` prompts of benchmarks/prompts.jsonl, chat and code in turn."""
    kinds: dict[str, list[str]] = {"chat": [], "code": []}
    for line in (ROOT / "benchmarks" / "prompts.jsonl").read_text().splitlines():
        row = json.loads(line)
        kinds[row["kind"]].append(row["prompt"])
    prompts = [prompt for pair in zip(kinds["chat"], kinds["code"], strict=False) for prompt in pair]
    assert len(prompts) >= count
    requests = []
    for prompt in prompts[:count]:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        requests.append(Request(tuple(ids), max_new_tokens))
    return requests
