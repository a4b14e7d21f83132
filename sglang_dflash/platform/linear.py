"""Linear layers over weights in oneDNN's blocked layout.

A plain ``F.linear`` re-packs its weight into that layout in every call. With few rows that
is most of the time: over the 121 products of SmolLM2-135M in bfloat16 on one AVX-512 core,
30/38/48/66 ms for 1/8/16/32 rows fall to 16/21/29/48 ms.

The packed product is also row-invariant: a row's result has the same bits whatever the
number of rows (measured for 1 to 128 rows; one row alone takes another kernel in float32
for some shapes, and a slower one in bfloat16, so fewer than ``MIN_ROWS`` are padded).
Not on every processor: with AMX a wide layer's bfloat16 product of 33 rows and more takes another
kernel than that of 32. So each shape is tried when it is packed (`invariant_rows`), and products of more
rows than keep their bits are computed in parts.

A CPU without bfloat16 instructions emulates them: on a 2.5 GHz Xeon with AVX-512 only, 22 GFLOP/s
against 72 in float32 (32 rows). There 16-bit weights are packed as float32, the sums are float32 as
before and the result is rounded to the layer's dtype.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod

from sglang_dflash.platform.capability import multiplies_bf16

logger = logging.getLogger(__name__)

MIN_ROWS = 4
#: Rows that the blocked layout is chosen for.
_HINT_ROWS = 16
#: Numbers of rows that a shape is tried with.
_TRIED_ROWS = (5, 8, 12, 16, 17, 24, 32, 33, 48, 64, 96, 128, 192, 256)
_COMPARED_ROWS = 64
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def packed_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a layer of ``dtype`` is multiplied."""
    return dtype if dtype == torch.bfloat16 and multiplies_bf16() else torch.float32


def pack(weight: torch.Tensor) -> torch.Tensor | None:
    """``weight`` ``[out, in]`` in the blocked layout, or None where oneDNN cannot use one.

    The result has the dtype ``packed_dtype`` names.
    """
    if weight.device.type != "cpu" or weight.dtype not in _DTYPES or weight.dim() != 2:
        return None
    plain = weight.detach().to(packed_dtype(weight.dtype)).contiguous()
    return torch.ops.mkldnn._reorder_linear_weight(plain, _HINT_ROWS)


_most_rows: dict[tuple[int, int, torch.dtype, int], int | None] = {}


def invariant_rows(packed: torch.Tensor, out: int, width: int) -> int | None:
    """The most rows that one product may have and keep every row's bits; None for any number.

    Which kernel oneDNN takes depends on shapes, dtype and processor, so a shape is tried once.

    Args:
        packed: a weight ``[out, width]`` in the blocked layout.
    """
    key = (out, width, packed.dtype, torch.get_num_threads())
    if key not in _most_rows:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(_TRIED_ROWS[-1], width, generator=generator).to(packed.dtype)
        # Few outputs round differently where the sums do, so many rows are compared.
        base = torch.cat([packed_linear(part, packed) for part in x[:_COMPARED_ROWS].split(MIN_ROWS)])

        def same(rows: int) -> bool:
            compared = min(rows, _COMPARED_ROWS)
            return torch.equal(packed_linear(x[:rows], packed)[:compared], base[:compared])

        kept = [rows for rows in _TRIED_ROWS if same(rows)]
        lost = [rows for rows in _TRIED_ROWS if rows not in kept]
        most = max((rows for rows in kept if not lost or rows < lost[0]), default=MIN_ROWS)
        # Kernels change at powers of two; a row or two more can agree by chance.
        _most_rows[key] = 1 << (most.bit_length() - 1) if lost else None
    return _most_rows[key]


def packed_linear(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None, most: int | None = None
) -> torch.Tensor:
    """``x @ weight.T + bias``. x: ``[..., in]``; returns ``[..., out]`` in x's dtype.

    ``most`` is the greatest number of rows of one product (`invariant_rows`).
    """
    rows = x.shape[0]
    if x.dim() != 2:
        return packed_linear(x.reshape(-1, x.shape[-1]), packed, bias, most).view(*x.shape[:-1], -1)
    if x.dtype != packed.dtype:
        wide = None if bias is None else bias.to(packed.dtype)
        return packed_linear(x.to(packed.dtype), packed, wide, most).to(x.dtype)
    if most is not None and rows > most:
        return torch.cat([packed_linear(part, packed, bias) for part in x.split(most)])
    if rows < MIN_ROWS:
        x = torch.constant_pad_nd(x, (0, 0, 0, MIN_ROWS - rows))
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")[:rows]
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


class PackedLinearMethod(UnquantizedLinearMethod):
    """SGLang's unquantized linear method over a packed copy of the layer's weight."""

    def __init__(self, packed: torch.Tensor, most: int | None = None) -> None:
        super().__init__()
        self.packed, self.most = packed, most

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return packed_linear(x, self.packed, bias, self.most)


class PackedHeadMethod(UnquantizedEmbeddingMethod):
    """The same for a logits head; looking up an embedding still reads the plain weight."""

    def __init__(self, packed: torch.Tensor, most: int | None = None) -> None:
        super().__init__()
        self.packed, self.most = packed, most

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return packed_linear(x.to(layer.weight.dtype), self.packed, bias, self.most)


class PackedForward:
    """The forward of a ``torch.nn.Linear`` (a drafter's ``fc``) over a packed copy of its weight."""

    def __init__(self, packed: torch.Tensor, most: int | None, bias: torch.Tensor | None) -> None:
        self.packed, self.most, self.bias = packed, most, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return packed_linear(x, self.packed, self.bias, self.most)


class PackedKV:
    """``kv_proj_only`` of SGLang's drafter attention: K and V of the target's features.

    SGLang slices them from the fused weight, which is then packed anew in every call: half a millisecond of
    a plain step of 40 that drafts nothing (SmolLM2-135M, one core).
    """

    def __init__(self, packed: torch.Tensor, most: int | None) -> None:
        self.packed, self.most = packed, most

    def __call__(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = packed_linear(hidden, self.packed, None, self.most).chunk(2, dim=-1)
        return keys, values


def _pack_context(model: torch.nn.Module, most: int | None) -> None:
    """Give a drafter's attention layers a packed projection of the target's features."""
    for attn in model.modules():
        fused: Any = getattr(attn, "qkv_proj", None)
        if (
            not hasattr(attn, "kv_proj_only")
            or not isinstance(getattr(fused, "quant_method", None), UnquantizedLinearMethod)
            or fused.bias is not None
            or attn.v_scale is not None
        ):
            continue
        packed = pack(fused.weight[attn.q_size : attn.q_size + 2 * attn.kv_size])
        if packed is not None:
            attn.kv_proj_only = PackedKV(packed, most)


def head_logits(lm_head: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Logits ``[rows, vocab]`` of ``hidden`` ``[rows, hidden]``, through the packed head if there is one."""
    method = getattr(lm_head, "quant_method", None)
    if isinstance(method, PackedHeadMethod):
        return method.apply(lm_head, hidden)
    return torch.nn.functional.linear(hidden.to(lm_head.weight.dtype), lm_head.weight)


def pack_model(model: torch.nn.Module) -> int:
    """Give every unquantized linear layer and the logits head of ``model`` a packed weight.

    The plain weights stay: other parts of SGLang read them. Called again after a weight
    update it packs the new values. Nothing is packed when that would take more than half of
    the free memory. Returns the bytes of packed weights.
    """
    import psutil

    targets = _packable(model)
    size = sum(m.weight.numel() * packed_dtype(m.weight.dtype).itemsize for m, _ in targets)
    if size > psutil.virtual_memory().available // 2:
        logger.warning(
            "CPU platform: no memory for a packed copy of %.1f GiB of weights; passes will be slower and "
            "not row-invariant.",
            size / 2**30,
        )
        return 0
    packed = [(module, method, pack(module.weight)) for module, method in targets]
    found = [invariant_rows(p, *module.weight.shape) for module, _, p in packed if p is not None]
    # One layer's loss is every layer's: where sums differ only few outputs round differently, and a narrow
    # layer's trial can miss them.
    most = min((rows for rows in found if rows is not None), default=None)
    for module, method, weight in packed:
        if weight is not None and method is PackedForward:
            module.forward = PackedForward(weight, most, module.bias)
        elif weight is not None:
            module.quant_method = method(weight, most)
    _pack_context(model, most)
    logger.info("CPU platform: packed %.0f MiB of weights for oneDNN.", size / 2**20)
    return size


def _packable(model: torch.nn.Module) -> list[tuple[torch.nn.Module, type]]:
    """The layers of ``model`` whose weight can be packed, with the method that will use it."""
    head = getattr(model, "lm_head", None)
    found: list[tuple[torch.nn.Module, type]] = []
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if getattr(getattr(module, "weight", None), "dtype", None) not in _DTYPES:
            continue
        if isinstance(method, UnquantizedLinearMethod):
            found.append((module, PackedLinearMethod))
        elif module is head and isinstance(method, UnquantizedEmbeddingMethod):
            found.append((module, PackedHeadMethod))
        elif type(module) is torch.nn.Linear:
            found.append((module, PackedForward))
    return found
