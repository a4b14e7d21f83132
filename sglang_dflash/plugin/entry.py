"""Entry point ``sglang.srt.plugins: dflash_tree``. SGLang calls it in every process it starts."""

from __future__ import annotations


def register() -> None:
    """Register the hooks that put the tree worker in place of the chain worker.

    SGLang catches ``Exception`` from a plugin, logs it and goes on, which here would mean a
    server that silently decodes with the built-in chain. ``SystemExit`` is not caught.
    """
    try:
        from sglang_dflash.plugin import hooks
        from sglang_dflash.settings import get_settings
        from sglang_dflash.upstream.contract import check

        get_settings()
        check()
        hooks.register_all()
    except Exception as error:
        raise SystemExit(f"sglang-dflash: {error}") from error
