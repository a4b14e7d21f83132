"""Lean forwards of SGLang's layer operators, with fewer torch calls than its native ones.

Registered for our dispatch key; SGLang binds them to the operator's instance. Each falls
back to ``forward_native`` for the variants it does not cover. All are row-invariant.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from sglang_dflash.platform import DISPATCH_KEY


def rms_norm(
    self: Any,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    post_residual_addition: torch.Tensor | None = None,
    quant_linear: torch.nn.Module | None = None,
) -> Any:
    """``RMSNorm``: x ``[rows, hidden]`` -> normed, or (normed, x + residual)."""
    weight = self.weight
    if (
        post_residual_addition is not None
        or self.variance_size_override is not None
        or self.cast_x_before_out_mul
        or self.fp32_residual
        or self.override_orig_dtype is not None
        or weight.dtype != x.dtype
        or x.shape[-1] != self.hidden_size
    ):
        return self.forward_native(x, residual, post_residual_addition)
    if residual is None:
        return F.rms_norm(x, (self.hidden_size,), weight, self.variance_epsilon)
    summed = x + residual
    return F.rms_norm(summed, (self.hidden_size,), weight, self.variance_epsilon), summed


def silu_and_mul(self: Any, x: torch.Tensor) -> torch.Tensor:
    """``SiluAndMul``: ``[rows, 2d]`` -> ``[rows, d]``."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class _Angles:
    """cos and signed sin for one positions tensor, shared by the layers of a pass."""

    __slots__ = ("cache", "cos", "positions", "sin")

    def __init__(self, positions: torch.Tensor, cache: torch.Tensor) -> None:
        # A copy: the caller's tensor may be a buffer that the next pass overwrites.
        self.positions, self.cache = positions.clone(), cache
        cos, sin = cache.index_select(0, positions).chunk(2, dim=-1)
        self.cos = torch.cat((cos, cos), -1).unsqueeze(1)
        self.sin = torch.cat((-sin, sin), -1).unsqueeze(1)

    def fits(self, positions: torch.Tensor, cache: torch.Tensor) -> bool:
        return self.cache is cache and torch.equal(self.positions, positions)


def rotary_embedding(
    self: Any,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    offsets: torch.Tensor | None = None,
    fused_set_kv_buffer_arg: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``RotaryEmbedding``: query ``[rows, heads * dim]``, key ``[rows, kv_heads * dim]``."""
    if (
        offsets is not None
        or fused_set_kv_buffer_arg is not None
        or not self.is_neox_style
        or self.rotary_dim != self.head_size
        or query.dim() != 2
        or positions.dim() != 1
        or hasattr(self, "sin_cos_cache")
    ):
        return self.forward_native(positions, query, key, offsets, fused_set_kv_buffer_arg)
    angles = _angles_of(self, positions)
    return _rotate(query, angles, self.head_size), _rotate(key, angles, self.head_size)


def _angles_of(rope: Any, positions: torch.Tensor) -> _Angles:
    angles = rope.__dict__.get("_dflash_angles")
    if angles is None or not angles.fits(positions, rope.cos_sin_cache):
        angles = _Angles(positions, rope.cos_sin_cache)
        rope.__dict__["_dflash_angles"] = angles
    return angles


def _rotate(x: torch.Tensor, angles: _Angles, head_size: int) -> torch.Tensor:
    heads = x.unflatten(-1, (-1, head_size))
    swapped = heads.roll(head_size // 2, -1)
    return torch.addcmul(heads * angles.cos, swapped, angles.sin).flatten(1)


def apply_scaling_penalties(logits: torch.Tensor, scaling_penalties: torch.Tensor) -> None:
    """SGLang's repetition penalty in place, eagerly: its ``torch.compile`` costs the first penalised
    request of a CPU server some 14 seconds."""
    logits[:] = torch.where(logits < 0, logits * scaling_penalties, logits / scaling_penalties)


def register() -> None:
    """Hand the forwards above to SGLang for our dispatch key."""
    from sglang.kernels.fused_op import BaseFusedOp
    from sglang.srt.layers import rotary_embedding as ropes
    from sglang.srt.layers.activation import SiluAndMul
    from sglang.srt.layers.layernorm import RMSNorm

    BaseFusedOp.register_oot_forward(RMSNorm, rms_norm, DISPATCH_KEY)
    BaseFusedOp.register_oot_forward(SiluAndMul, silu_and_mul, DISPATCH_KEY)
    base = ropes.RotaryEmbedding
    for cls in [base, *base.__subclasses__()]:
        # Scalings that only fill the cos/sin cache in another way share the base's forward.
        if cls.forward_native is base.forward_native:
            BaseFusedOp.register_oot_forward(cls, rotary_embedding, DISPATCH_KEY)
