"""Server arguments that the CPU platform sets or refuses."""

from __future__ import annotations

import os
from typing import Any

from sglang_dflash.platform import ATTENTION_BACKEND

#: Backends that run here: ours, and SGLang's slower one for plain decoding.
USABLE_BACKENDS = (None, ATTENTION_BACKEND, "torch_native")
#: Prompt tokens of one pass. SGLang's default, made for GPUs, keeps a CPU busy for a minute, in which
#: the scheduler answers nobody: not ``/health``, which then says 503, and no abort.
PREFILL_CHUNK = 256
KV_CACHE_DTYPES = (None, "auto", "bf16", "bfloat16")


def is_interpreted(backend: str | None) -> bool:
    """SGLang's Triton backend runs where Triton's interpreter does: slow, for tests of the GPU path."""
    return backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def offer_attention_backend() -> None:
    """Let ``--attention-backend`` and the draft worker know our backend's name.

    The draft worker's builder consults a list of names and not the platform; a name that is
    missing there silently becomes flashinfer.
    """
    from sglang.srt.arg_groups import choices

    for names in (choices.ATTENTION_BACKEND_CHOICES, choices.DRAFT_ATTENTION_BACKEND_CHOICES):
        if ATTENTION_BACKEND not in names:
            names.append(ATTENTION_BACKEND)


def apply(server_args: Any) -> None:
    """Make our attention backend the default of every pass and prefill chunks short; refuse what cannot run.

    SGLang's own rule for ``device == "cpu"`` has run by now and wrote ``intel_amx`` (or
    ``torch_native`` on Arm) without asking the platform; both fail on a verify pass here.
    What the user named is in the raw input and stays.

    Raises:
        SystemExit: with one line, for settings that cannot work here.
    """
    raw = getattr(server_args, "_raw_input", None) or {}
    for field in ("attention_backend", "prefill_attention_backend", "decode_attention_backend"):
        _refuse_unless(raw.get(field) in USABLE_BACKENDS or is_interpreted(raw.get(field)), field, raw)
    _refuse_unless(raw.get("kv_cache_dtype") in KV_CACHE_DTYPES, "kv_cache_dtype", raw)
    if raw.get("attention_backend") is None:
        server_args.attention_backend = ATTENTION_BACKEND
    chunk = server_args.chunked_prefill_size
    if raw.get("chunked_prefill_size") is None and (chunk is None or chunk > PREFILL_CHUNK):
        page = server_args.page_size or 1
        server_args.chunked_prefill_size = max(page, PREFILL_CHUNK // page * page)


def _refuse_unless(usable: bool, field: str, raw: dict[str, Any]) -> None:
    if not usable:
        flag = "--" + field.replace("_", "-")
        raise SystemExit(
            f"sglang-dflash: {flag} {raw[field]} does not run on the CPU platform; drop the flag."
        )
