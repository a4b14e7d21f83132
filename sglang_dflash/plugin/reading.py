"""What SGLang makes of a drafter's config: asked of SGLang itself, in the parent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sglang_dflash.errors import UserError
from sglang_dflash.plugin.obstacles import Facts


def check_reading(folder: Path, facts: Facts) -> None:
    """Have SGLang read the drafter's config as its scheduler will.

    Raises:
        UserError: SGLang would refuse it.
    """
    _check_context(_read(folder, facts.cfg), facts)


def _read(folder: Path, cfg: Any) -> Any:
    from sglang.srt.speculative.dflash_utils import (
        get_dflash_attention_sliding_window_size,
        get_dflash_layer_types,
        parse_dflash_draft_config,
    )
    from sglang.srt.utils.hf_transformers_utils import get_config

    try:
        config = get_config(
            str(folder),
            trust_remote_code=cfg.trust_remote_code,
            model_override_args=json.loads(cfg.json_model_override_args),
        )
        parse_dflash_draft_config(draft_hf_config=config)
        types = get_dflash_layer_types(config)
        if types is not None and len(types) < config.num_hidden_layers:
            raise ValueError(f"layer_types has {len(types)} entries for {config.num_hidden_layers} layers")
        get_dflash_attention_sliding_window_size(config)
    except Exception as error:
        said = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise UserError(f"SGLang cannot read {folder / 'config.json'}: {said}{_hint(folder)}") from error
    return config


def _hint(folder: Path) -> str:
    raw = json.loads((folder / "config.json").read_text())
    if raw.get("sliding_window") and not raw.get("use_sliding_window"):
        # transformers' Qwen3Config takes the window for unset without it.
        return '; add "use_sliding_window": true to it, without which its sliding_window is dropped'
    if "model_type" not in raw:
        return '; add its "model_type" ("qwen3" for z-lab\'s drafters)'
    return ""


def _check_context(config: Any, facts: Facts) -> None:
    """SGLang lets no drafter run at positions beyond its own config's; said here and not in the scheduler."""
    from sglang.srt.environ import envs
    from sglang.srt.utils.hf_transformers_utils import get_context_length, get_hf_text_config
    from sglang.utils import is_in_ci

    ours, theirs = get_context_length(get_hf_text_config(config)), facts.model.context_len
    if ours >= theirs or envs.SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN.get() or is_in_ci():
        return
    raise UserError(
        f"the drafter's context is {ours} tokens (its max_position_embeddings) and the server's {theirs}, "
        f"which SGLang refuses; start with --context-length {ours}, or set "
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN=1 to draft beyond it (texts stay right, drafts get worse)"
    )
