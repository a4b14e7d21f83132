"""Replacements for the places where SGLang 0.5.23 assumes a GPU and offers no platform hook.

Applied once per process from the platform's ``init_backend``, that is when SGLang imports
its model runner and before it builds anything.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_dflash.errors import UserError
from sglang_dflash.platform import ATTENTION_BACKEND, fused_ops, hashing, slots
from sglang_dflash.platform.contracts import Contract, check, replace

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

_RMS_NORM = ("self", "x", "residual", "post_residual_addition", "quant_linear")
_ROPE = ("self", "positions", "query", "key", "offsets", "fused_set_kv_buffer_arg")

#: Not replaced here, but overridden or called with exactly these parameters.
RELIED_ON = (
    Contract(_ALLOCATION, "get_last_loc_torch", GET_LAST_LOC.parameters),
    Contract(_POOL, "MHATokenToKVPool._init_kv_copy_and_warmup", ("self",)),
    Contract(_POOL, "MHATokenToKVPool._move_kv_cache_impl", ("self", "tgt_loc", "src_loc")),
    Contract(_POOL, "move_kv_cache_native", ("k_buffer", "v_buffer", "tgt_loc", "src_loc")),
    Contract("sglang.srt.layers.layernorm", "RMSNorm.forward_native", _RMS_NORM),
    Contract("sglang.srt.layers.activation", "SiluAndMul.forward_native", ("self", "x")),
    Contract("sglang.srt.layers.rotary_embedding", "RotaryEmbedding.forward_native", _ROPE),
    Contract("sglang.srt.layers.attention.attention_registry", "register_attention_backend", ("name",)),
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
        _register_attention_backend()
        fused_ops.register()
        _ignore_streams_of_cpu_tensors()
    except UserError as error:
        raise SystemExit(f"sglang-dflash: {error}") from error
    _applied = True


def _register_attention_backend() -> None:
    from sglang.srt.arg_groups import choices
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    @register_attention_backend(ATTENTION_BACKEND)
    def create(runner: Any) -> Any:
        from sglang_dflash.platform.attention_backend import CpuAttentionBackend

        return CpuAttentionBackend(runner)

    # The draft worker's builder consults this list and not the platform; a name that is
    # missing there silently becomes flashinfer.
    for names in (choices.ATTENTION_BACKEND_CHOICES, choices.DRAFT_ATTENTION_BACKEND_CHOICES):
        if ATTENTION_BACKEND not in names:
            names.append(ATTENTION_BACKEND)


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
    torch.Tensor.record_stream = record_stream  # type: ignore[assignment,method-assign]
