"""The soak's tasks that are more than one request: sessions of two turns, tool calls, several samples."""

from __future__ import annotations

import json
from typing import Any

import httpx
from soak_load import Answer, Task, answer_of

_TOOL = {
    "type": "function",
    "function": {
        "name": "note",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "maxLength": 16}, "times": {"type": "integer"}},
            "required": ["word", "times"],
            "additionalProperties": False,
        },
    },
}


def ask(http: httpx.Client, task: Task) -> Answer:
    """Have the whole exchange.

    Raises:
        httpx.HTTPError: the server did not answer as it should.
    """
    if task.kind == "tool call":
        return _tool_call(http, task)
    if task.kind == "two samples":
        reply = http.post("/generate", json=task.body())
        reply.raise_for_status()
        return joined([answer_of(sample) for sample in reply.json()])
    return _session(http, task, streaming=task.kind == "streaming session")


def joined(parts: list[Answer]) -> Answer:
    """Several answers as one."""
    return Answer(
        ids=[token for part in parts for token in part.ids],
        text="\n".join(part.text for part in parts),
        finish=[part.finish for part in parts],
        tokens=sum(part.tokens for part in parts),
        passes=sum(part.passes for part in parts),
        logprobs=[],
        retractions=sum(part.retractions for part in parts),
    )


def _post(http: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    reply = http.post(path, json=body)
    reply.raise_for_status()
    return reply.json() if reply.content else None


def _session(http: httpx.Client, task: Task, *, streaming: bool) -> Answer:
    """Two turns; the second is what the first's user says next."""
    opened = _post(http, "/open_session", {"capacity_of_str_len": 4000, "streaming": streaming})
    try:
        first = _post(http, "/generate", task.body() | {"session_params": {"id": opened}})
        where = {"id": opened} if streaming else {"id": opened, "rid": first["meta_info"]["id"]}
        more = task.body() | {"input_ids": list(task.ids[-12:]), "session_params": where}
        return joined([answer_of(first), answer_of(_post(http, "/generate", more))])
    finally:
        _post(http, "/close_session", {"session_id": opened})


def _tool_call(http: httpx.Client, task: Task) -> Answer:
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": f"Note the word {task.word}, three times."}],
        "tools": [_TOOL],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_tokens": task.params["max_new_tokens"],
        "logprobs": True,
    }
    reply = _post(http, "/v1/chat/completions", body)
    (choice,) = reply["choices"]
    said = [item["token"] for item in choice["logprobs"]["content"]]
    calls = [call["function"] for call in choice["message"].get("tool_calls") or []]
    return Answer(
        ids=[
            sum(token.encode()) for token in said
        ],  # the route gives no ids: any number that a token decides
        text=json.dumps([choice["message"].get("content"), calls]),
        finish=choice["finish_reason"],
        tokens=len(said),
        passes=0,
        logprobs=[item["logprob"] for item in choice["logprobs"]["content"]],
    )
