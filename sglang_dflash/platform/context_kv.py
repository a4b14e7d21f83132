"""A drafter's K and V of the target's features, all its layers' from one product.

SGLang projects layer by layer with plain products, which pack their weight anew in every call: 1.4 ms of a
plain step of 40 ms that drafts nothing (SmolLM2-135M, one core).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.models.dflash import DFlashAttention, DFlashDraftModel
from sglang.srt.speculative.dflash_utils import can_dflash_use_fused_qkv_proj

from sglang_dflash.platform.linear import invariant_rows, pack, packed_linear

#: (layer, K [rows, kv_heads, dim], V) -> writes them to the drafter's cache.
WriteLayer = Callable[[int, torch.Tensor, torch.Tensor], None]


class PackedContextKV:
    """What SGLang's CUDA helper (``FusedKVMaterializeHelper``) is to its worker, on a CPU.

    Args:
        layers: a drafter's; see :func:`fits`.
    """

    def __init__(self, layers: list[Any]) -> None:
        self._layers = [layer.self_attn for layer in layers]
        first = self._layers[0]
        self._width, self._dim, self._eps = first.kv_size, first.head_dim, first.k_norm.variance_epsilon
        weights = [attn.qkv_proj.weight[attn.q_size :] for attn in self._layers]
        keys = [weight[: self._width] for weight in weights]
        values = [weight[self._width :] for weight in weights]
        stacked = torch.cat([*keys, *values])
        packed = pack(stacked)
        assert packed is not None, "fits() says that the weights can be packed"
        self._packed, self._most = packed, invariant_rows(packed, *stacked.shape)
        # [layers, 1, dim], beside K of [rows, layers, kv_heads, dim]
        self._scales = torch.stack([attn.k_norm.weight.detach() for attn in self._layers])[:, None]

    @torch.inference_mode()
    def materialize(
        self, *, ctx_hidden: torch.Tensor, positions: torch.Tensor, write_layer_kv: WriteLayer
    ) -> None:
        """Project and write.

        Args:
            ctx_hidden: [rows, hidden], projected features.
            positions: int64 [rows].
        """
        count = len(self._layers)
        both = packed_linear(ctx_hidden, self._packed, None, self._most)
        keys, values = both.chunk(2, dim=-1)
        keys = keys.reshape(-1, count, self._width // self._dim, self._dim)
        keys = torch.nn.functional.rms_norm(keys, (self._dim,), None, self._eps) * self._scales
        # The layers stand for more heads: they turn by the same angles.
        keys = self._layers[0].apply_k_rope(positions, keys.flatten(1))
        keys = keys.view(-1, count, self._width // self._dim, self._dim)
        values = values.view(-1, count, self._width // self._dim, self._dim)
        for i in range(count):
            write_layer_kv(i, keys[:, i], values[:, i])


def fits(model: Any) -> bool:
    """Whether a drafter's layers are of the kind that :class:`PackedContextKV` computes."""
    if not isinstance(model, DFlashDraftModel) or not getattr(model, "supports_fused_context_kv", True):
        return False
    if type(model).prepare_context_hidden_for_kv is not DFlashDraftModel.prepare_context_hidden_for_kv:
        return False  # every layer reads a context of its own
    attentions = [layer.self_attn for layer in model.layers]
    if not attentions:
        return False
    first = attentions[0]
    return all(
        type(attn) is DFlashAttention
        and can_dflash_use_fused_qkv_proj(attn.qkv_proj)[0]
        and attn.v_scale is None
        and not getattr(attn, "use_gemma_norm", False)
        and (attn.kv_size, attn.head_dim) == (first.kv_size, first.head_dim)
        and attn.k_norm.variance_epsilon == first.k_norm.variance_epsilon
        and attn.k_norm.weight.dtype == attn.qkv_proj.weight.dtype
        and attn.attn.k_scale is None
        and attn.attn.v_scale is None
        and attn.rotary_emb is first.rotary_emb  # SGLang keeps one per set of arguments
        and pack(attn.qkv_proj.weight[:1]) is not None
        for attn in attentions
    )
