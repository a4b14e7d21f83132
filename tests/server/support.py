"""Start real servers for tests and talk to their native ``/generate`` endpoint in token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from sglang_dflash.client.info import ServerInfo
from sglang_dflash.client.server import Server

ROOT = Path(__file__).resolve().parents[2]
COMMON = ["--sleep-on-idle", "--log-level", "info", "--skip-server-warmup"]


@dataclass(frozen=True)
class Request:
    """One greedy request: token ids in, token ids out."""

    ids: tuple[int, ...]
    max_new_tokens: int


def embedded_args(target: Path, dtype: str, *more: str) -> list[str]:
    return ["--model-path", str(target), "--dtype", dtype, "--max-total-tokens", "24576", *COMMON, *more]


def dflash_args(drafter: Path, nodes: int | None = None) -> list[str]:
    width = [] if nodes is None else ["--speculative-num-draft-tokens", str(nodes)]
    return ["--speculative-algorithm", "DFLASH", "--speculative-draft-model-path", str(drafter), *width]


class Client:
    """A server's native endpoint.

    ``generate`` keeps ``batch`` requests in flight and returns the replies in order.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.http = httpx.Client(base_url=server.url, timeout=600.0, trust_env=False)

    def post(self, **body: Any) -> dict[str, Any]:
        reply = self.http.post("/generate", json=body)
        reply.raise_for_status()
        return reply.json()

    def generate(self, requests: Sequence[Request], batch: int, **params: Any) -> list[dict[str, Any]]:
        def one(request: Request) -> dict[str, Any]:
            return self.post(
                input_ids=list(request.ids),
                sampling_params={"temperature": 0, "max_new_tokens": request.max_new_tokens, **params},
            )

        with ThreadPoolExecutor(batch) as pool:
            return list(pool.map(one, requests))

    def info(self) -> ServerInfo:
        reply = self.http.get("/server_info")
        reply.raise_for_status()
        return ServerInfo.model_validate(reply.json())


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
