"""Reads server arguments as JSON lines, has SGLang resolve each with the plugin, prints what came of it.

A process of its own, because SGLang chooses its platform once: with ``SGLANG_PLUGINS=dflash_tree`` and
``--device cuda`` it is an NVIDIA machine as far as arguments go.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class _Hopper:
    """SGLang's platform, as if the card were an H100."""

    is_sm90 = True

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def resolve(args: list[str], env: dict[str, str], default_backend: str) -> dict[str, Any]:
    from sglang.srt.arg_groups import attention_hook, overrides
    from sglang.srt.runtime_context import get_platform
    from sglang.srt.server_args import prepare_server_args

    from sglang_dflash.plugin import mode
    from sglang_dflash.settings import get_settings

    get_settings.cache_clear()
    attention_hook.get_platform = lambda: _Hopper(get_platform())
    overrides.get_default_attn_backend = lambda *args, **kwargs: default_backend
    said = _Lines()
    logging.getLogger("sglang_dflash").addHandler(said)
    before = dict(os.environ)
    os.environ.update(env)
    try:
        record = prepare_server_args(args)
        record.resolve_once()
        view = overrides.resolving_view(record)
        decision = mode.decided()
        return {
            "mode": decision.mode,
            "reason": decision.reason,
            "way_out": decision.way_out,
            "told": os.environ.get("SGLANG_DFLASH_DECISION"),
            "algorithm": view.speculative_algorithm,
            "running": view.max_running_requests,
            "nodes": view.speculative_num_draft_tokens,
            "backends": [view.attention_backend, view.speculative_draft_attention_backend],
            "passes": {
                "prompts": view.prefill_attention_backend or view.attention_backend,
                "verify": view.decode_attention_backend or view.attention_backend,
                "mode": view.speculative_attention_mode,
            },
            "page_size": view.page_size,
            "said": said.lines,
        }
    except (Exception, SystemExit) as error:
        return {"error": f"{error}", "kind": type(error).__name__, "said": said.lines}
    finally:
        logging.getLogger("sglang_dflash").removeHandler(said)
        os.environ.clear()
        os.environ.update(before)


def main() -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    for line in sys.stdin:
        case = json.loads(line)
        got = resolve(case["args"], case.get("env", {}), case.get("default_backend", "fa3"))
        print("RESULT " + json.dumps(got), flush=True)


if __name__ == "__main__":
    main()
