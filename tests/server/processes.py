"""Servers that are stopped in mid-stream: what their client sees and which processes are left."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import psutil

from tests.server.support import Client, Request, body_of

GONE_SECONDS = 240.0
LONG = Request(tuple(range(3, 40)), 400)


def family(client: Client) -> list[psutil.Process]:
    root = psutil.Process(client.server.pid)
    return [root, *root.children(recursive=True)]


def all_gone(processes: list[psutil.Process]) -> bool:
    """Whether every process ended in time; a zombie has ended, its parent has not looked yet."""
    end = time.monotonic() + GONE_SECONDS
    while not all(map(_ended, processes)):
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def _ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE or not process.is_running()
    except psutil.NoSuchProcess:
        return True


def stream(client: Client, after_first: Callable[[], None]) -> tuple[list[int], dict[str, Any] | None, bool]:
    """Stream the long request and call ``after_first`` when its first chunk is here.

    Returns:
        the tokens that came, the finish reason of the last chunk, whether the stream ended orderly.
    """
    tokens: list[int] = []
    finish, started, orderly = None, False, False
    body = body_of(LONG, ignore_eos=True) | {"stream": True}
    try:
        with client.http.stream("POST", "/generate", json=body) as reply:
            for line in reply.iter_lines():
                if line == "data: [DONE]":
                    orderly = True
                elif line.startswith("data: "):
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        return tokens, chunk, False
                    tokens, finish = chunk["output_ids"], chunk["meta_info"]["finish_reason"]
                    if not started:
                        started = True
                        after_first()
    except httpx.HTTPError:
        orderly = False
    return tokens, finish, orderly
