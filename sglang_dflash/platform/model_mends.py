"""Changes to a loaded model: off GPU-only kernels, onto the fast CPU ones."""

from __future__ import annotations

import sys

import torch

from sglang_dflash.platform.linear import pack_model

_DFLASH = "sglang.srt.models.dflash"
#: What a DFlash 2 drafter has compiled; on a CPU that takes half a minute of the first request, and more for
#: every other block.
_COMPILED = ("_grouped_conv", "_score_edges", "_follow_maps")
#: FlashInfer's top-k, a CUDA kernel, by which SGLang's own chain takes a selector's candidates; without it
#: SGLang calls ``torch.topk``.
_RADIX = "_flashinfer_top_k"


def mend_model(model: torch.nn.Module) -> None:
    """Adjust ``model`` in place after SGLang loaded its weights."""
    for module in model.modules():
        # The drafter's fused QK-norm + RoPE is a CUDA kernel that bfloat16 selects blindly.
        if getattr(module, "use_table_qk_norm_rope", False):
            module.use_table_qk_norm_rope = False
    if type(model).__module__ == _DFLASH:
        _run_on_a_cpu()
    pack_model(model)


def _run_on_a_cpu() -> None:
    module = sys.modules[_DFLASH]
    if hasattr(module, _RADIX):
        setattr(module, _RADIX, None)
    for name in _COMPILED:
        original = getattr(getattr(module, name, None), "_torchdynamo_orig_callable", None)
        if original is not None:
            setattr(module, name, original)
