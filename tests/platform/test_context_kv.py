"""All layers' K and V from one product are those that SGLang projects layer by layer."""

from __future__ import annotations

from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.models.dflash import DFlashAttention

from sglang_dflash.platform.context_kv import PackedContextKV

HIDDEN, HEADS, DIM, LAYERS = 96, 3, 16, 4
WIDTH = HEADS * DIM


def rope(
    positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    angles = positions[:, None, None] * torch.arange(1, DIM // 2 + 1) / DIM
    left, right = key.unflatten(-1, (-1, DIM)).chunk(2, -1)
    cos, sin = angles.cos().to(key.dtype), angles.sin().to(key.dtype)
    return query, torch.cat((left * cos - right * sin, right * cos + left * sin), -1).flatten(1)


def layer(dtype: torch.dtype, generator: torch.Generator) -> Any:
    """As much of ``DFlashAttention`` as a projection needs, with its own methods."""
    scale = (1 + 0.1 * torch.randn(DIM, generator=generator)).to(dtype)
    weight = (torch.randn(5 * WIDTH, HIDDEN, generator=generator) * HIDDEN**-0.5).to(dtype)

    class Norm:
        weight, variance_epsilon = scale, 1e-5

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return F.rms_norm(x, (DIM,), self.weight, self.variance_epsilon)

    attn = SimpleNamespace(
        q_size=3 * WIDTH,
        kv_size=WIDTH,
        head_dim=DIM,
        v_scale=None,
        k_norm=Norm(),
        rotary_emb=rope,
        qkv_proj=SimpleNamespace(quant_method=UnquantizedLinearMethod(), weight=weight, bias=None),
    )
    for name in ("kv_proj_only", "apply_k_norm", "apply_k_rope"):
        setattr(attn, name, MethodType(getattr(DFlashAttention, name), attn))
    return SimpleNamespace(self_attn=attn)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_every_layers_keys_and_values(rows: int, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(rows)
    layers = [layer(dtype, generator) for _ in range(LAYERS)]
    hidden = torch.randn(rows, HIDDEN, generator=generator).to(dtype)
    positions = torch.randint(0, 500, (rows,), generator=generator)
    written: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    PackedContextKV(layers).materialize(
        ctx_hidden=hidden, positions=positions, write_layer_kv=lambda i, k, v: written.update({i: (k, v)})
    )
    assert sorted(written) == list(range(LAYERS))
    for i, made in enumerate(layers):
        attn = made.self_attn
        keys, values = attn.kv_proj_only(hidden)
        keys = attn.apply_k_rope(positions, attn.apply_k_norm(keys))
        for got, want in zip(written[i], (keys, values), strict=True):
            assert got.shape == (rows, HEADS, DIM)
            torch.testing.assert_close(got.flatten(1), want, atol=tolerance, rtol=tolerance)
