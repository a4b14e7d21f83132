"""Everything a server can know before it loads a weight: does the drafter fit, is anything asked
for that trees do not serve, and how many nodes to verify when nobody said.

Called in the parent process from the hook on SGLang's ``_handle_dflash``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sglang_dflash.drafter import DrafterConfig, check_fits, resolve_folder
from sglang_dflash.errors import UserError
from sglang_dflash.plugin.budget import default_nodes
from sglang_dflash.settings import MAX_NODES, get_settings
from sglang_dflash.step.width import Width
from sglang_dflash.worker.width.control import check_setting

MIN_NODES = 2
CHAIN = "or set SGLANG_DFLASH_MODE=chain"


def check_start(server_args: Any) -> None:
    """Check a server's arguments and fill in the node budget.

    Raises:
        SystemExit: one line with the cause and the mend.
    """
    try:
        _check(server_args)
    except UserError as error:
        raise SystemExit(f"sglang-dflash: {error}") from None


def _check(server_args: Any) -> None:
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    cfg = resolving_view(server_args)
    if cfg.speculative_draft_model_path is None:
        raise UserError("DFLASH needs a drafter; give its folder to --speculative-draft-model-path")
    target = _target_config(cfg)
    folder = resolve_folder(cfg.speculative_draft_model_path, cfg.speculative_draft_model_revision)
    drafter = check_fits(folder, target=target, target_name=cfg.served_model_name or cfg.model_path)

    for refusal in REFUSALS:
        if refusal.applies(cfg, target, drafter):
            raise UserError(f"draft trees do not serve {refusal.what}; {refusal.mend}")

    block = int(cfg.speculative_dflash_block_size or drafter.block)
    chosen = cfg.speculative_num_draft_tokens
    if chosen is None and cfg.speculative_dflash_block_size is None:
        chosen = default_nodes(
            device=str(cfg.device),
            dtype=str(cfg.dtype),
            block=block,
            pinned=get_settings().width == "fixed",
        )
        declare_resolution(server_args, "sglang_dflash", speculative_num_draft_tokens=chosen)
    nodes = int(chosen if chosen is not None else block)
    if not MIN_NODES <= nodes <= MAX_NODES:
        raise UserError(
            f"--speculative-num-draft-tokens {nodes} is not a node budget the kernels take; "
            f"choose {MIN_NODES} to {MAX_NODES}"
        )
    check_setting(get_settings().width, Width(nodes, block))
    if str(cfg.device).startswith("cuda"):
        for name, value in _cuda_backends(cfg):
            declare_resolution(server_args, "sglang_dflash", **{name: value})


def _target_config(cfg: Any) -> Any:
    from sglang.srt.utils.hf_transformers_utils import get_config

    try:
        config = get_config(cfg.model_path, trust_remote_code=cfg.trust_remote_code, revision=cfg.revision)
    except Exception as error:
        raise UserError(
            f"cannot read the target's config at {cfg.model_path!r} ({type(error).__name__}); "
            "give a model folder or hub name to --model-path"
        ) from error
    return config.get_text_config()


def _cuda_backends(cfg: Any) -> Iterator[tuple[str, str]]:
    """The tree kernel hangs on SGLang's Triton backend: choose it where nobody chose."""
    if not (cfg.attention_backend or cfg.decode_attention_backend or cfg.prefill_attention_backend):
        yield "attention_backend", "triton"
    if cfg.speculative_draft_attention_backend is None:
        yield "speculative_draft_attention_backend", "triton"


@dataclass(frozen=True)
class Refusal:
    """Something SGLang serves and draft trees do not: refused at start, never at a request."""

    what: str
    mend: str
    applies: Callable[[Any, Any, DrafterConfig], bool]


def _is_hybrid(cfg: Any, target: Any, drafter: DrafterConfig) -> bool:
    """Mamba, gated-delta-net and linear-attention hybrids: their state cannot branch."""
    marks = (
        "linear_attn_config",
        "linear_num_value_heads",
        "mamba_d_state",
        "mamba_n_heads",
        "ssm_cfg",
        "full_attention_interval",
        "hybrid_override_pattern",
        "attn_type_list",
    )
    layers = set(getattr(target, "layer_types", None) or []) | set(
        getattr(target, "layers_block_type", None) or []
    )
    linear = {"linear_attention", "mamba", "mamba2", "recurrent", "lightning_attention"}
    return bool(layers & linear) or any(getattr(target, mark, None) for mark in marks)


def _wrong_backend(cfg: Any, target: Any, drafter: DrafterConfig) -> bool:
    named = {cfg.attention_backend, cfg.decode_attention_backend, cfg.prefill_attention_backend} - {None}
    if str(cfg.device).startswith("cuda"):
        return bool(named - {"triton"})
    return bool(named - {"dflash_cpu", "triton"})


REFUSALS = (
    Refusal(
        "targets with Mamba or linear-attention layers (their state cannot branch)",
        f"use a target with attention layers only, {CHAIN}",
        _is_hybrid,
    ),
    Refusal(
        "drafters with a DFlash 2 selector, Domino or LiLiCorr head",
        f"use a plain DFlash drafter, {CHAIN}",
        lambda cfg, target, drafter: bool(
            drafter.dflash_config.selector_rank
            or drafter.dflash_config.lilicorr
            or drafter.dflash_config.projector_type in ("domino", "lilicorr")
        ),
    ),
    Refusal(
        "an attention backend without our tree kernel",
        f"leave out --attention-backend (triton on CUDA, dflash_cpu on CPU), {CHAIN}",
        _wrong_backend,
    ),
    Refusal(
        "deterministic inference",
        f"leave out --enable-deterministic-inference, {CHAIN}",
        lambda cfg, target, drafter: bool(cfg.enable_deterministic_inference),
    ),
    Refusal(
        "unified memory",
        f"leave out --enable-unified-memory, {CHAIN}",
        lambda cfg, target, drafter: bool(cfg.enable_unified_memory),
    ),
    Refusal(
        "data-parallel attention",
        f"leave out --enable-dp-attention, {CHAIN}",
        lambda cfg, target, drafter: bool(cfg.enable_dp_attention),
    ),
    Refusal(
        "decode context parallelism",
        f"leave out --dcp-size, {CHAIN}",
        lambda cfg, target, drafter: (cfg.dcp_size or 1) > 1,
    ),
    Refusal(
        "a drafter window",
        f"leave out --speculative-draft-window-size, {CHAIN}",
        lambda cfg, target, drafter: cfg.speculative_draft_window_size is not None,
    ),
    Refusal(
        "LoRA adapters",
        f"leave out --enable-lora and --lora-paths, {CHAIN}",
        lambda cfg, target, drafter: bool(cfg.enable_lora or cfg.lora_paths),
    ),
    Refusal(
        "hierarchical sparse attention",
        f"leave out --enable-hisparse, {CHAIN}",
        lambda cfg, target, drafter: bool(cfg.enable_hisparse),
    ),
)
