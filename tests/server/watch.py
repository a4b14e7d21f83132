"""What a server's scheduler is doing, and how to wait until it does something else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from tests.server.support import Client

SECONDS = 120.0


def load(client: Client) -> dict[str, Any]:
    reply = client.http.get("/v1/loads", params={"include": "core"})
    reply.raise_for_status()
    return reply.json()["loads"][0]


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def call(client: Client, route: str, **body: Any) -> None:
    reply = client.http.post(route, json=body)
    assert reply.status_code == 200, reply.text


def flushed(client: Client) -> None:
    """Wait until nothing runs, drop the cache, and check that all KV slots are free again."""
    until(lambda: client.http.post("/flush_cache").status_code == 200)
    until(lambda: load(client)["num_used_tokens"] == 0)


@contextmanager
def running(client: Client, bodies: list[dict[str, Any]]) -> Iterator[list[Future]]:
    """Send the bodies; the block runs once all of them are being decoded."""
    before = len(bodies)
    with ThreadPoolExecutor(before) as pool:
        jobs = [pool.submit(client.post, **body) for body in bodies]
        until(lambda: load(client)["num_running_reqs"] == before or any(job.done() for job in jobs))
        assert not any(job.done() for job in jobs), "the requests are too short for this test"
        yield jobs
