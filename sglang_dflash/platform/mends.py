"""Replacements for the places where SGLang 0.5.23 assumes a GPU and offers no platform hook.

Applied once per process from the platform's ``init_backend``, that is when SGLang imports
its model runner and before it builds anything.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from sglang_dflash.errors import UserError
from sglang_dflash.platform import ATTENTION_BACKEND, fused_ops, hashing, slots
from sglang_dflash.platform.contracts import Contract, check, replace
from sglang_dflash.platform.embeds import in_own_dtype
from sglang_dflash.platform.transfer import mend_transfers

_ALLOCATION = "sglang.srt.mem_cache.allocation"
_POOL = "sglang.srt.mem_cache.memory_pool"

ASSIGN_REQ_TO_TOKEN = Contract(
    _ALLOCATION,
    "assign_req_to_token_pool_func",
    ("req_pool_indices", "req_to_token", "start_offset", "end_offset", "out_cache_loc", "batch_size"),
)
GET_LAST_LOC = Contract(
    _ALLOCATION, "get_last_loc", ("req_to_token", "req_pool_indices_tensor", "prefix_lens_tensor")
)
MURMUR_HASH = Contract(
    "sglang.kernels.ops.sampling.murmur_hash", "murmur_hash32", ("seed", "positions", "col_indices")
)

SCALING_PENALTIES = Contract(
    "sglang.srt.sampling.penaltylib.repetition_penalty",
    "apply_scaling_penalties",
    ("logits", "scaling_penalties"),
)

_UNQUANT = "sglang.srt.layers.quantization.unquant"
_METADATA = ("self", "forward_batch")
_SET_KV = (
    "self",
    "layer",
    "loc_info",
    "cache_k",
    "cache_v",
    "k_scale",
    "v_scale",
    "layer_id_override",
    "dcp_kv_mask",
)
_RMS_NORM = ("self", "x", "residual", "post_residual_addition", "quant_linear")
_ROPE = ("self", "positions", "query", "key", "offsets", "fused_set_kv_buffer_arg")

#: Not replaced here, but overridden or called with exactly these parameters.
RELIED_ON = (
    Contract(_ALLOCATION, "get_last_loc_torch", GET_LAST_LOC.parameters),
    Contract(_POOL, "MHATokenToKVPool._init_kv_copy_and_warmup", ("self",)),
    Contract(_POOL, "MHATokenToKVPool._move_kv_cache_impl", ("self", "tgt_loc", "src_loc")),
    Contract(_POOL, "move_kv_cache_native", ("k_buffer", "v_buffer", "tgt_loc", "src_loc")),
    Contract(_POOL, "MHATokenToKVPool.set_kv_buffer", _SET_KV),
    Contract(_POOL, "unwrap_write_loc", ("loc_info",)),
    Contract(_UNQUANT, "UnquantizedLinearMethod.apply", ("self", "layer", "x", "bias")),
    Contract(_UNQUANT, "UnquantizedEmbeddingMethod.apply", ("self", "layer", "x", "bias")),
    Contract(
        "sglang.srt.layers.attention.base_attn_backend", "AttentionBackend.init_forward_metadata", _METADATA
    ),
    Contract("sglang.kernels.fused_op", "BaseFusedOp.register_oot_forward", ("op_cls", "fn", "platform_key")),
    Contract("sglang.srt.layers.layernorm", "RMSNorm.forward_native", _RMS_NORM),
    Contract("sglang.srt.layers.activation", "SiluAndMul.forward_native", ("self", "x")),
    Contract("sglang.srt.layers.rotary_embedding", "RotaryEmbedding.forward_native", _ROPE),
    Contract("sglang.srt.layers.attention.attention_registry", "register_attention_backend", ("name",)),
)

#: Methods after which a model holds other weights than those that were packed.
WEIGHT_UPDATES = tuple(
    Contract("sglang.srt.model_executor.model_runner_components.weight_updater", f"WeightUpdater.{name}")
    for name in (
        "update_weights_from_disk",
        "load_weights_from_distributed",
        "update_weights_from_tensor",
        "update_weights_from_ipc",
    )
)

#: The runner's module is being imported when ``apply_mends`` runs; this one waits for a model.
FORWARD_KWARGS = Contract(
    "sglang.srt.model_executor.model_runner",
    "ModelRunner._extend_forward_kwargs",
    ("self", "forward_batch", "pp_proxy_tensors"),
)

_applied = False


def apply_mends() -> None:
    """Apply every mend once.

    Raises:
        SystemExit: with one line, when the installed SGLang is not the expected one.
    """
    global _applied
    if _applied:
        return
    try:
        for contract in RELIED_ON:
            check(contract)
        replace(ASSIGN_REQ_TO_TOKEN, slots.assign_req_to_token)
        replace(GET_LAST_LOC, check(RELIED_ON[0]))
        replace(MURMUR_HASH, hashing.murmur_hash32)
        replace(SCALING_PENALTIES, fused_ops.apply_scaling_penalties)
        _register_attention_backend()
        fused_ops.register()
        _repack_after_weight_updates()
        _ignore_streams_of_cpu_tensors()
        mend_transfers()
    except UserError as error:
        raise SystemExit(f"sglang-dflash: {error}") from error
    _applied = True


def mend_runner() -> None:
    """What is left to mend once the model runner's module is there; safe to call twice.

    Raises:
        SystemExit: with one line, when the installed SGLang is not the expected one.
    """
    try:
        original = check(FORWARD_KWARGS)
    except UserError as error:
        raise SystemExit(f"sglang-dflash: {error}") from error
    owner = Contract(FORWARD_KWARGS.module, "ModelRunner").resolve()
    if not hasattr(original, "__wrapped__"):
        owner._extend_forward_kwargs = in_own_dtype(original)


def _register_attention_backend() -> None:
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    @register_attention_backend(ATTENTION_BACKEND)
    def create(runner: Any) -> Any:
        from sglang_dflash.platform.attention_backend import CpuAttentionBackend

        try:
            return CpuAttentionBackend(runner)
        except UserError as error:
            # One line in the log; any other exception is a traceback of the scheduler.
            raise SystemExit(f"sglang-dflash: {error}") from None


def _ignore_streams_of_cpu_tensors() -> None:
    """``Tensor.record_stream`` raises for CPU tensors, and the DFLASH worker calls it on one.

    It tells the caching allocator of a GPU about another stream; the CPU has neither.
    """
    original = torch.Tensor.record_stream
    if getattr(original, "ignores_cpu", False):
        return

    def record_stream(self: torch.Tensor, stream: Any) -> None:
        if self.device.type != "cpu":
            original(self, stream)

    record_stream.ignores_cpu = True  # type: ignore[attr-defined]
    torch.Tensor.record_stream = record_stream


def _repack_after_weight_updates() -> None:
    """Keep the packed weights equal to the model's when a client replaces those."""
    for contract in WEIGHT_UPDATES:
        original = check(contract)
        owner, _, name = contract.name.rpartition(".")
        cls = Contract(contract.module, owner).resolve()
        setattr(cls, name, _then_repack(original))


def _then_repack(original: Any) -> Any:
    @functools.wraps(original)
    def update(self: Any, *args: Any, **kwargs: Any) -> Any:
        from sglang_dflash.platform.linear import pack_model

        result = original(self, *args, **kwargs)
        pack_model(self.get_model())
        return result

    return update
