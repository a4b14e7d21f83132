"""Everything a server can know before it loads a weight: does the drafter fit, is anything asked
for that trees do not serve and who decodes then, and how many nodes to verify when nobody said.

Called in the parent process from the hook on SGLang's ``_handle_dflash``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sglang_dflash.drafter import check_fits, read_config, resolve_folder
from sglang_dflash.errors import UserError
from sglang_dflash.plugin.budget import default_nodes
from sglang_dflash.plugin.mode import Decision, Mode, decide, decided
from sglang_dflash.plugin.obstacles import Facts, first_obstacle, named_backends
from sglang_dflash.plugin.reading import check_reading
from sglang_dflash.settings import MAX_NODES, get_settings
from sglang_dflash.step.width import Width
from sglang_dflash.worker.width.control import check_setting

logger = logging.getLogger("sglang_dflash")

MIN_NODES = 2
CHAIN = "or set SGLANG_DFLASH_MODE=chain"


def check_start(server_args: Any) -> None:
    """Check a server's arguments, decide who decodes and, for trees, fill in the node budget.

    Raises:
        SystemExit: one line with the cause and the mend.
    """
    try:
        _check(server_args)
    except UserError as error:
        raise SystemExit(f"sglang-dflash: {error}") from None


#: What makes a server speculate; without them it is the one that the same command starts without a drafter.
_SPECULATION = (
    "speculative_algorithm",
    "speculative_draft_model_path",
    "speculative_draft_model_revision",
    "speculative_num_draft_tokens",
    "speculative_dflash_block_size",
    "speculative_draft_window_size",
    "speculative_draft_attention_backend",
)


def leave_out_drafter(server_args: Any) -> None:
    """Resolve the arguments as if nobody had asked for a drafter."""
    from sglang.srt.arg_groups.overrides import declare_resolution

    declare_resolution(server_args, "sglang_dflash", **dict.fromkeys(_SPECULATION))


@contextmanager
def keep_room(server_args: Any) -> Iterator[None]:
    """Around SGLang's handling of DFLASH, which lets 48 requests run unless told otherwise.

    On a CPU under trees as many may run as in plain decoding. On CUDA its cap stays: the logits buffer of
    its graphs is sized by the greatest batch times the greatest width.
    """
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    cfg = resolving_view(server_args)
    asked = cfg.max_running_requests
    yield
    if asked is None and decided().mode == "tree" and cfg.device == "cpu":
        declare_resolution(server_args, "sglang_dflash", max_running_requests=None)
        logger.info("sglang-dflash: as many requests may run as in plain decoding, not 48")


def _check(server_args: Any) -> None:
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    cfg = resolving_view(server_args)
    if cfg.speculative_draft_model_path is None:
        raise UserError("DFLASH needs a drafter; give its folder to --speculative-draft-model-path")
    folder = resolve_folder(cfg.speculative_draft_model_path, cfg.speculative_draft_model_revision)
    read_config(folder)  # before the target's: a wrong path is no matter of the target
    model = _target_model(server_args)
    name = cfg.served_model_name or cfg.model_path
    drafter = check_fits(folder, target=model.hf_text_config, target_name=name)
    facts = Facts(cfg, model, drafter, named_backends(server_args))
    check_reading(folder, facts)

    decision = _decide(facts)
    decide(decision)
    if decision.mode != "tree":
        return

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
        declare_resolution(server_args, "sglang_dflash", **_cuda_backends(facts))


def _target_model(server_args: Any) -> Any:
    """SGLang's ``ModelConfig`` of the target, the one that its own argument handling made."""
    from sglang.srt.arg_groups.model_override_base import model_config_of

    try:
        return model_config_of(server_args)
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot read the target's config at {server_args.model_path!r} ({first}); "
            "give a model folder or hub name to --model-path"
        ) from error


def _decide(facts: Facts) -> Decision:
    """Trees where they can serve. Else, where the setting lets us choose, whoever can.

    Raises UserError where nobody can, or where trees are asked for.
    """
    obstacle = first_obstacle(facts)
    if obstacle is None:
        return Decision("tree")
    # On a CPU the chain turns temperature above 0 into argmax and fails in float32.
    mode: Mode = "plain" if facts.on_cpu else "chain"
    if mode == "chain" and facts.drafter.anchor_first:
        raise UserError(
            f"draft trees do not serve {obstacle.what}, and SGLang's chain would take the drafter's tokens "
            f"for those one place later (its rows predict the next token); {obstacle.way_out}"
        )
    if get_settings().mode == "tree":
        raise UserError(f"draft trees do not serve {obstacle.what}; {obstacle.way_out}, {CHAIN}")
    return Decision(mode, obstacle.what, obstacle.way_out)


def _cuda_backends(facts: Facts) -> dict[str, str]:
    """Which attention serves which pass. The tree kernel hangs on SGLang's Triton backend, so verify and
    draft passes are that one's; where another was named it reads the prompts (``HybridAttnBackend``)."""
    chosen = {"speculative_draft_attention_backend": "triton"}
    if not facts.backends:
        return {**chosen, "attention_backend": "triton"}
    reader = str(facts.cfg.prefill_attention_backend or facts.cfg.attention_backend)
    if reader == "triton":
        return {**chosen, "attention_backend": "triton", "decode_attention_backend": "triton"}
    logger.info("sglang-dflash: %s reads prompts; our kernel in SGLang's Triton backend decodes", reader)
    return {
        **chosen,
        "prefill_attention_backend": reader,
        "decode_attention_backend": "triton",
        "speculative_attention_mode": "decode",
    }
