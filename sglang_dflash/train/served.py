"""Accept length of a running server, from what it says of its own requests."""

from __future__ import annotations

from pathlib import Path

import httpx

from sglang_dflash.errors import UserError
from sglang_dflash.train.collect import read_prompts


def accept_length(base: str, prompts: Path, max_new: int, limit: int = 0) -> dict:
    """Greedy answers to ``prompts`` one at a time; tokens per target pass from ``meta_info``.

    ``spec_verify_ct`` counts verify passes; the first token of an answer comes from the prefill.
    """
    from openai import OpenAI

    tokens = passes = answers = 0
    url = base.rstrip("/")
    try:
        model = OpenAI(base_url=f"{url}/v1", api_key="none").models.list().data[0].id
        for _, text in list(read_prompts(prompts))[: limit or None]:
            reply = httpx.post(
                f"{url}/v1/chat/completions",
                json={
                    "model": model, "messages": [{"role": "user", "content": text}],
                    "temperature": 0, "max_tokens": max_new, "return_meta_info": True,
                },
                timeout=600,
            )  # fmt: skip
            reply.raise_for_status()
            meta = reply.json()["choices"][0].get("meta_info") or {}
            count = int(meta.get("spec_verify_ct") or 0)
            if not count:
                raise UserError(
                    f"{url} reports no spec_verify_ct: start it with a drafter (sglang-dflash serve)"
                )
            tokens += int(meta["completion_tokens"]) - 1
            passes += count
            answers += 1
    except httpx.HTTPError as error:
        raise UserError(f"cannot reach {url}: {error}") from None
    return {"accept_length": tokens / max(passes, 1), "tokens": tokens, "passes": passes, "answers": answers}
