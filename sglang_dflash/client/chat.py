"""Chat requests, greedy by default, by the ``openai`` client, streamed, SGLang's extra fields read back."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import openai
from pydantic import BaseModel, ConfigDict, ValidationError

from sglang_dflash.client import access
from sglang_dflash.client.jsonl import read_rows
from sglang_dflash.errors import UserError

Kind = Literal["chat", "code", "edit"]


class Prompt(BaseModel):
    """One line of a prompt file."""

    model_config = ConfigDict(extra="forbid")

    id: str
    kind: Kind
    prompt: str


def read_prompts(path: Path) -> list[Prompt]:
    """Read a JSON-lines prompt file; raises :class:`UserError` naming the file and the bad line."""
    prompts = []
    for number, row in read_rows(path):
        try:
            prompts.append(Prompt.model_validate(row))
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"{path}, line {number}: {first['msg']}") from error
    if not prompts:
        raise UserError(f"{path} holds no prompts")
    return prompts


@dataclass(frozen=True)
class Reply:
    """One streamed reply. Times are in seconds, token counts are the server's.

    ``verify_passes`` and ``correct_drafts`` are 0 without speculative decoding. ``inter_token`` holds
    one value per token after the first: a chunk that brings n tokens counts as n gaps of 1/n each.
    """

    id: str
    kind: str
    text: str
    prompt_ids: list[int]
    output_ids: list[int]
    finish: str
    seconds: float
    first_token: float
    verify_passes: int
    correct_drafts: int
    inter_token: list[float] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return len(self.output_ids)

    @property
    def accept_length(self) -> float | None:
        """Tokens per target pass, bonus included; None without speculative decoding."""
        return 1 + self.correct_drafts / self.verify_passes if self.verify_passes else None


def mean_accept_length(replies: Iterable[Reply]) -> float | None:
    """Tokens per target pass over all passes of all replies (not a mean of means)."""
    passes = drafts = 0
    for reply in replies:
        passes += reply.verify_passes
        drafts += reply.correct_drafts
    return 1 + drafts / passes if passes else None


def connect(url: str, timeout: float = 600.0) -> openai.OpenAI:
    """An ``openai`` client for a local SGLang server: no retries that would hide a failure."""
    import httpx

    http = httpx.Client(timeout=timeout, trust_env=False)
    return openai.OpenAI(
        base_url=f"{url}/v1", api_key=access.api_key() or "none", max_retries=0, http_client=http
    )


def _extra(chunk: Any) -> dict[str, Any]:
    extra = (chunk.model_extra or {}).get("sglext")
    return extra if isinstance(extra, dict) else {}


def stream_reply(
    client: openai.OpenAI,
    prompt: Prompt,
    *,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int | None = None,
    model: str = "default",
    on_text: Callable[[str], None] | None = None,
) -> Reply:
    """Send one prompt, greedily unless said otherwise, and read the stream to its end.

    SGLang returns token ids and speculative counters in ``sglext``, in a chunk after the last text.
    Raises :class:`UserError` when the server does not send them (another server, an error).
    """
    start = time.perf_counter()
    arrivals: list[tuple[float, int]] = []
    pieces: list[str] = []
    finish = ""
    details: dict[str, Any] = {}
    try:
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": prompt.prompt}],
            temperature=temperature,
            seed=seed,
            max_tokens=max_tokens,
            stream=True,
            extra_body={
                "stream_options": {"include_usage": True, "continuous_usage_stats": True},
                "return_input_ids_in_sglext": True,
                "return_output_ids_in_sglext": True,
                "return_spec_tokens_details": True,
            },
        )
        for chunk in stream:
            details.update(_extra(chunk))
            if not chunk.choices:
                continue
            choice = chunk.choices[0]
            if choice.delta.content:
                tokens = chunk.usage.completion_tokens if chunk.usage else len(arrivals) + 1
                arrivals.append((time.perf_counter() - start, tokens))
                pieces.append(choice.delta.content)
                if on_text is not None:
                    on_text(choice.delta.content)
            finish = choice.finish_reason or finish
    except openai.APIError as error:
        raise UserError(f"the server failed on prompt {prompt.id}: {error}") from error
    seconds = time.perf_counter() - start
    if not details.get("output_ids"):
        raise UserError(f"the server sent no token ids for prompt {prompt.id}; is it SGLang 0.5.23?")
    spec = details.get("spec_tokens_details") or {}
    return Reply(
        id=prompt.id,
        kind=prompt.kind,
        text="".join(pieces),
        prompt_ids=list(details.get("input_ids") or []),
        output_ids=list(details["output_ids"][0]),
        finish=finish,
        seconds=seconds,
        first_token=arrivals[0][0] if arrivals else seconds,
        verify_passes=int(spec.get("spec_verify_ct", 0)),
        correct_drafts=int(spec.get("spec_num_correct_drafts", 0)),
        inter_token=inter_token_gaps(arrivals),
    )


def inter_token_gaps(arrivals: list[tuple[float, int]]) -> list[float]:
    """Seconds per token after the first arrival.

    Args:
        arrivals: (seconds since the request, tokens received so far) for every chunk.
    """
    gaps: list[float] = []
    for (before, had), (now, have) in itertools.pairwise(arrivals):
        new = max(have - had, 1)
        gaps.extend([(now - before) / new] * new)
    return gaps
