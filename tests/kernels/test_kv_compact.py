"""KV compaction: every row lands, nothing else changes, overlaps are safe."""

from __future__ import annotations

import pytest
import torch
from dflash_kernels import KVCompactor, compact_kv
from hypothesis import given
from hypothesis import strategies as st

SHAPES = [
    ((2, 8), torch.bfloat16),
    ((1, 64), torch.float32),
    ((3, 5), torch.float16),  # 30 bytes: not a multiple of four
    ((2, 16), torch.float8_e4m3fn),
]


def make_caches(rows: int, device: str, shapes=SHAPES) -> list[torch.Tensor]:
    """Caches whose every byte is drawn, so that any wrong or extra write shows."""
    return [
        torch.randint(0, 256, (rows, *shape, dtype.itemsize), dtype=torch.uint8)
        .to(device)
        .view(dtype)
        .view(rows, *shape)
        for shape, dtype in shapes
    ]


def as_bytes(cache: torch.Tensor) -> torch.Tensor:
    return cache.cpu().contiguous().view(torch.uint8)


@given(
    bs=st.integers(1, 3),
    N=st.integers(1, 24),
    D=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    page=st.sampled_from([1, 16]),
)
def test_moves_paths_and_nothing_else(backend, bs, N, D, seed, page):
    g = torch.Generator().manual_seed(seed)
    rows = -(-bs * N // page) * page + page
    pages = torch.randperm(rows // page, generator=g)
    slots = (pages[:, None] * page + torch.arange(page)).view(-1)[: bs * N].view(bs, N)
    D = min(D, N)
    path = torch.full((bs, D), -1, dtype=torch.int32)
    accept = torch.zeros(bs, dtype=torch.int32)
    for b in range(bs):
        n = int(torch.randint(1, D + 1, (1,), generator=g))
        accept[b] = n
        # Any ascending ids from 0 are possible paths; dense ones overlap sources and targets.
        path[b, :n] = (
            torch.cat([torch.zeros(1).long(), 1 + torch.randperm(N - 1, generator=g)[: n - 1]]).sort().values
        )
    caches = make_caches(rows, backend.device)
    before = [as_bytes(c).clone() for c in caches]
    dev = backend.device
    backend.compact(caches, slots.to(dev), path.to(dev), accept.to(dev))
    for cache, old in zip(caches, before, strict=True):
        expected = old.clone()
        for b in range(bs):
            for d in range(int(accept[b])):
                expected[slots[b, d]] = old[slots[b, path[b, d]]]
        assert torch.equal(as_bytes(cache), expected)


@pytest.mark.parametrize("path", [[0, 1, 2, 3], [0, 2, 3, 4], [0, 1, 3, 7], [0, 5, 6, 7]])
def test_overlapping_moves(backend, path):
    """Targets are other moves' sources; rows hold their own number."""
    cache = torch.arange(10.0)[:, None, None].expand(10, 2, 4).contiguous().to(backend.device)
    slots = torch.arange(1, 9)[None].to(backend.device)
    backend.compact(
        [cache],
        slots,
        torch.tensor([path], dtype=torch.int32, device=backend.device),
        torch.tensor([4], dtype=torch.int32, device=backend.device),
    )
    assert cache[1:5, 0, 0].tolist() == [p + 1.0 for p in path]
    assert cache[5:9, 0, 0].tolist() == [5.0, 6.0, 7.0, 8.0]
    assert cache[0, 0, 0] == 0.0
    assert cache[9, 0, 0] == 9.0


def test_reads_slots_only_below_accept_len(backend):
    """Slots beyond the accepted path may be garbage."""
    cache = torch.randn(4, 1, 8, device=backend.device)
    before = cache.clone()
    slots = torch.tensor([[2, 1, 10**9, -(10**9)]], device=backend.device)
    path = torch.tensor([[0, 3, 2, -1]], dtype=torch.int32, device=backend.device)
    backend.compact([cache], slots, path, torch.tensor([1], dtype=torch.int32, device=backend.device))
    assert torch.equal(cache, before)


def test_rows_inside_a_wider_buffer(backend):
    """A cache may be a slice whose row stride exceeds its row."""
    buffer = torch.randn(12, 3, 8, device=backend.device)
    cache = buffer[:, 1:2]
    before = buffer.clone()
    slots = torch.tensor([[3, 7, 5]], device=backend.device)
    path = torch.tensor([[0, 2]], dtype=torch.int32, device=backend.device)
    backend.compact([cache], slots, path, torch.tensor([2], dtype=torch.int32, device=backend.device))
    before[7, 1] = before[5, 1]
    assert torch.equal(buffer, before)


def test_compactor_checks_its_caches():
    with pytest.raises(ValueError, match="at least one"):
        KVCompactor([])
    with pytest.raises(ValueError, match="contiguous"):
        KVCompactor([torch.zeros(4, 8, 2).transpose(1, 2)])


def test_public_entry():
    caches = make_caches(6, "cpu")
    twin = [c.clone() for c in caches]
    slots = torch.tensor([[4, 2, 0]])
    path = torch.tensor([[0, 2]], dtype=torch.int32)
    accept = torch.tensor([2], dtype=torch.int32)
    compact_kv(caches, slots, path, accept)
    KVCompactor(twin)(slots, path, accept)
    for a, b in zip(caches, twin, strict=True):
        assert torch.equal(as_bytes(a), as_bytes(b))
        assert torch.equal(as_bytes(a)[2], as_bytes(a)[0])
