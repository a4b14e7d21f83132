"""Changes to a loaded model: off GPU-only kernels, onto the fast CPU ones."""

from __future__ import annotations

import torch

from sglang_dflash.platform.linear import pack_model


def mend_model(model: torch.nn.Module) -> None:
    """Adjust ``model`` in place after SGLang loaded its weights."""
    for module in model.modules():
        # The drafter's fused QK-norm + RoPE is a CUDA kernel that bfloat16 selects blindly.
        if getattr(module, "use_table_qk_norm_rope", False):
            module.use_table_qk_norm_rope = False
    pack_model(model)
