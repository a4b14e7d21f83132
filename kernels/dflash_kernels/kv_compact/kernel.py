"""KV compaction in one launch over all layers, through a table of cache addresses.

A program owns one byte range of one cache for one request. It reads every moving row of its range into
registers, passes a barrier, then writes them: no write can overtake a read, whatever the overlap. Rows
already in place (node id = depth, the whole spine) are neither read nor written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

_TILE_BYTES = 32 * 1024


@triton.jit(do_not_specialize=["stride_slots", "stride_path", "D"])
def compact_kv_kernel(
    base_ptr,
    row_stride_ptr,
    width_ptr,
    slots_ptr,
    path_ptr,
    accept_lens_ptr,
    stride_slots,
    stride_path,
    D,
    DP: tl.constexpr,
    ELEM: tl.constexpr,
    TILE: tl.constexpr,
):
    b = tl.program_id(0)
    cache = tl.program_id(1)
    depth = tl.arange(0, DP)
    accepted = tl.load(accept_lens_ptr + b)
    live = (depth < D) & (depth < accepted)
    node = tl.load(path_ptr + b * stride_path + depth, mask=live, other=0)
    live = live & (node != depth)
    if tl.sum(live.to(tl.int32), axis=0) > 0:
        width = tl.load(width_ptr + cache)
        col = tl.program_id(2) * TILE + tl.arange(0, TILE)
        stride = tl.load(row_stride_ptr + cache)
        base = tl.load(base_ptr + cache).to(tl.pointer_type(ELEM))
        src = tl.load(slots_ptr + b * stride_slots + node, mask=live, other=0).to(tl.int64)
        dst = tl.load(slots_ptr + b * stride_slots + depth, mask=live, other=0).to(tl.int64)
        mask = live[:, None] & (col < width)[None, :]
        rows = tl.load(base + src[:, None] * stride + col[None, :], mask=mask)
        tl.debug_barrier()
        tl.store(base + dst[:, None] * stride + col[None, :], rows, mask=mask)


class PointerTable:
    """Addresses, row strides and row widths of the caches, on the device.

    The element the kernel moves is the widest integer that divides every address, stride and width.
    """

    def __init__(self, caches: Sequence[torch.Tensor]) -> None:
        self.caches = list(caches)  # keeps the memory alive
        device = caches[0].device
        address = [c.data_ptr() for c in caches]
        stride = [c.stride(0) * c.element_size() for c in caches]
        width = [c[0].numel() * c.element_size() for c in caches]
        size = next(s for s in (8, 4, 2, 1) if all(x % s == 0 for x in (*address, *stride, *width)))
        self.elem_bytes = size
        self.elem = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}[size]
        self.address = torch.tensor(address, dtype=torch.int64, device=device)
        self.stride = torch.tensor([s // size for s in stride], dtype=torch.int64, device=device)
        self.width = torch.tensor([w // size for w in width], dtype=torch.int32, device=device)
        self.max_width = max(width) // size

    def __len__(self) -> int:
        return len(self.caches)


def compact_kv_triton(
    table: PointerTable, slots: torch.Tensor, path: torch.Tensor, accept_lens: torch.Tensor
) -> None:
    """Same contract as `dflash_kernels.KVCompactor.__call__`."""
    D = min(path.shape[1], slots.shape[1])
    DP = triton.next_power_of_2(D)
    tile = max(_TILE_BYTES // (DP * table.elem_bytes), 32)
    tile = min(tile, triton.next_power_of_2(table.max_width))
    grid = (slots.shape[0], len(table), triton.cdiv(table.max_width, tile))
    compact_kv_kernel[grid](
        table.address,
        table.stride,
        table.width,
        slots if slots.stride(1) == 1 else slots.contiguous(),
        path,
        accept_lens,
        slots.stride(0) if slots.stride(1) == 1 else slots.shape[1],
        path.stride(0),
        D,
        DP=DP,
        ELEM=table.elem,
        TILE=tile,
        num_warps=4,
    )
