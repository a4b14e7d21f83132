"""Packed linear layers and lean layer operators against SGLang's and float64 arithmetic."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.models.dflash import DFlashAttention

from sglang_dflash.platform import fused_ops
from sglang_dflash.platform.hashing import murmur_hash32
from sglang_dflash.platform.linear import (
    PackedHeadMethod,
    PackedKV,
    head_logits,
    invariant_rows,
    pack,
    pack_model,
    packed_linear,
)

SHAPES = [(576, 960), (1536, 576), (64, 33)]


def packed_or_skip(weight: torch.Tensor) -> torch.Tensor:
    packed = pack(weight)
    if packed is None:
        pytest.skip(f"oneDNN packs no {weight.dtype} weights on this machine")
    return packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 4, 32])
def test_packed_linear_is_the_product(dtype: torch.dtype, shape: tuple[int, int], rows: int) -> None:
    inputs, outputs = shape
    generator = torch.Generator().manual_seed(rows)
    weight = (torch.randn(outputs, inputs, generator=generator) * inputs**-0.5).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    expected = x.double() @ weight.double().T
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    packed = packed_or_skip(weight)
    torch.testing.assert_close(packed_linear(x, packed).double(), expected, atol=tolerance, rtol=tolerance)
    with_bias = packed_linear(x[None], packed, bias)[0].double()
    torch.testing.assert_close(with_bias, expected + bias.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_packed_row_does_not_depend_on_the_rows_beside_it(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    inputs, outputs = shape
    weight = torch.randn(outputs, inputs).to(dtype)
    packed = packed_or_skip(weight)
    x = torch.randn(64, inputs).to(dtype)
    wide = torch.randn(16384, 576).to(dtype)  # what a narrow layer's own trial may miss
    most = invariant_rows(packed_or_skip(wide), *wide.shape)
    together = packed_linear(x, packed, most=most)
    for rows in (1, 2, 3, 5, 8, 31, 40):
        assert torch.equal(packed_linear(x[:rows].contiguous(), packed, most=most), together[:rows]), rows


def test_odd_weights_are_left_alone() -> None:
    assert pack(torch.zeros(8, 8, dtype=torch.int8)) is None
    assert pack(torch.zeros(8)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_products_are_rounded_once(dtype: torch.dtype) -> None:
    """With or without the CPU's 16-bit instructions: float32 sums, then one rounding."""
    weight, x = torch.randn(33, 64).to(dtype), torch.randn(8, 64).to(dtype)
    exact = x.double() @ weight.double().T
    got = packed_linear(x, packed_or_skip(weight))
    assert got.dtype == dtype
    spacing = torch.finfo(dtype).eps * exact.abs().clamp(min=0.05)
    assert bool(((got.double() - exact).abs() <= 0.51 * spacing + 1e-5).all())


def test_head_logits_takes_the_packed_head_and_works_without_one() -> None:
    weight = torch.randn(96, 32)
    hidden = torch.randn(5, 32)
    plain = SimpleNamespace(weight=weight)
    packed = SimpleNamespace(weight=weight, quant_method=PackedHeadMethod(packed_or_skip(weight)))
    torch.testing.assert_close(head_logits(packed, hidden), head_logits(plain, hidden), atol=1e-4, rtol=1e-4)


class TestNorm:
    """``fused_ops.rms_norm`` against SGLang's own native forward."""

    @pytest.fixture
    def norm(self):
        from sglang.srt.layers.layernorm import RMSNorm

        made = RMSNorm(96, eps=1e-5)
        made.weight.data.copy_(torch.rand(96) + 0.5)
        return made

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_plain_and_with_residual(self, norm, dtype: torch.dtype) -> None:
        norm = norm.to(dtype)
        x, residual = torch.randn(2, 7, 96).to(dtype)
        tolerance = 1e-5 if dtype == torch.float32 else 4e-2
        got = fused_ops.rms_norm(norm, x)
        torch.testing.assert_close(got, norm.forward_native(x), atol=tolerance, rtol=tolerance)
        normed, summed = fused_ops.rms_norm(norm, x, residual)
        expected, expected_sum = norm.forward_native(x, residual)
        torch.testing.assert_close(normed, expected, atol=tolerance, rtol=tolerance)
        assert torch.equal(summed, expected_sum)

    def test_variants_it_does_not_cover_take_the_native_forward(self, norm) -> None:
        norm.cast_x_before_out_mul = True
        x = torch.randn(3, 96)
        assert torch.equal(fused_ops.rms_norm(norm, x), norm.forward_native(x))


class TestRope:
    @pytest.fixture
    def rope(self):
        from sglang.srt.layers.rotary_embedding import RotaryEmbedding

        return RotaryEmbedding(16, 16, 128, 10000, True, torch.float32)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_equals_the_native_forward(self, rope, dtype: torch.dtype) -> None:
        rope.cos_sin_cache = rope.cos_sin_cache.to(dtype)
        positions = torch.tensor([5, 100, 6])
        q, k = torch.randn(3, 64).to(dtype), torch.randn(3, 32).to(dtype)
        got = fused_ops.rotary_embedding(rope, positions, q, k)
        expected = rope.forward_native(positions, q, k)
        tolerance = 1e-6 if dtype == torch.float32 else 4e-2
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)

    def test_a_reused_positions_buffer_is_noticed(self, rope) -> None:
        positions = torch.tensor([1, 2])
        q, k = torch.randn(2, 64), torch.randn(2, 32)
        fused_ops.rotary_embedding(rope, positions, q, k)
        positions.copy_(torch.tensor([50, 60]))
        got = fused_ops.rotary_embedding(rope, positions, q, k)
        torch.testing.assert_close(got, rope.forward_native(positions, q, k), atol=1e-6, rtol=1e-6)


def test_silu_and_mul() -> None:
    x = torch.randn(4, 20)
    torch.testing.assert_close(
        fused_ops.silu_and_mul(None, x), F.silu(x[:, :10].double()).mul(x[:, 10:].double()).float()
    )


def murmur3_32(data: bytes) -> int:
    """MurmurHash3 x86_32 with seed 0 over whole 4-byte blocks."""

    def rotl(x: int, r: int) -> int:
        return ((x << r) | (x >> (32 - r))) & 0xFFFFFFFF

    h = 0
    for i in range(0, len(data), 4):
        k = int.from_bytes(data[i : i + 4], "little") * 0xCC9E2D51 & 0xFFFFFFFF
        h ^= rotl(k, 15) * 0x1B873593 & 0xFFFFFFFF
        h = (rotl(h, 13) * 5 + 0xE6546B64) & 0xFFFFFFFF
    h ^= len(data)
    h = (h ^ (h >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return h ^ (h >> 16)


def test_murmur_hash_equals_the_published_algorithm() -> None:
    seeds, positions, columns = [42, 2**63 - 1, -7], [0, 5, 2**31], [0, 1, 49151, 2**32 - 1]
    got = murmur_hash32(torch.tensor(seeds), torch.tensor(positions), torch.tensor(columns))
    assert got.dtype == torch.uint32
    for i, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        for j, column in enumerate(columns):
            data = (seed % 2**64).to_bytes(8, "little") + position.to_bytes(4, "little")
            assert int(got[i, j]) == murmur3_32(data + column.to_bytes(4, "little"))


def test_eager_repetition_penalty_equals_sglangs() -> None:
    """Against the function that ``torch.compile`` wraps in SGLang's wheel."""
    from sglang.srt.sampling.penaltylib import repetition_penalty

    original = inspect.unwrap(repetition_penalty.apply_scaling_penalties)
    logits, scales = torch.randn(3, 50), torch.rand(3, 50) + 0.5
    want, got = logits.clone(), logits.clone()
    original(want, scales)
    fused_ops.apply_scaling_penalties(got, scales)
    assert torch.equal(got, want)
    assert not torch.equal(got, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_drafters_context_is_projected_as_sglang_does(dtype: torch.dtype) -> None:
    """K and V come from a packed part of the fused weight."""
    heads, dim, hidden = 3, 16, 96

    class Attention(torch.nn.Module):
        q_size, kv_size, v_scale = 4 * heads * dim, heads * dim, None
        kv_proj_only = DFlashAttention.kv_proj_only

        def __init__(self) -> None:
            super().__init__()
            self.qkv_proj = torch.nn.Module()
            self.qkv_proj.weight = torch.nn.Parameter(
                (torch.randn(6 * heads * dim, hidden) * hidden**-0.5).to(dtype), requires_grad=False
            )
            self.qkv_proj.bias, self.qkv_proj.quant_method = None, UnquantizedLinearMethod()

    attn = Attention()
    x = torch.randn(5, hidden).to(dtype)
    want = attn.kv_proj_only(x)
    pack_model(attn)
    assert isinstance(attn.kv_proj_only, PackedKV)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for got, right in zip(attn.kv_proj_only(x), want, strict=True):
        torch.testing.assert_close(got, right, atol=tolerance, rtol=tolerance)
