"""KV slot bookkeeping: rows of the request table, moves and writes in the pool."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sglang_dflash.platform.slots import assign_req_to_token, extend_cache_locs


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_assign_writes_each_requests_slots_into_its_row(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.full((6, 40), -1, dtype=torch.int32)
    expected = table.clone()
    rows = torch.tensor([4, 0, 5, 2], dtype=dtype)
    start = torch.tensor([3, 0, 10, 7], dtype=dtype)
    end = torch.tensor([9, 1, 10, 40], dtype=dtype)  # the third request takes nothing
    slots = torch.randperm(1000, generator=generator)[: int((end - start).sum())]
    taken = 0
    for row, a, b in zip(rows.tolist(), start.tolist(), end.tolist(), strict=True):
        expected[row, a:b] = slots[taken : taken + b - a].int()
        taken += b - a
    assign_req_to_token(rows, table, start, end, slots, 4)
    assert torch.equal(table, expected)


def test_assign_ignores_slots_past_the_last_request() -> None:
    table = torch.zeros(2, 8, dtype=torch.int32)
    assign_req_to_token(
        torch.tensor([1]), table, torch.tensor([2]), torch.tensor([4]), torch.tensor([7, 8, 9, 9]), 1
    )
    assert table[1].tolist() == [0, 0, 7, 8, 0, 0, 0, 0]
    assert not table[0].any()


def test_extend_cache_locs_reads_the_next_columns() -> None:
    table = torch.arange(50, dtype=torch.int32).view(5, 10)
    start = torch.tensor([2, 7])
    got = extend_cache_locs(
        req_pool_indices=torch.tensor([3, 0]),
        req_to_token=table,
        start_offset=start,
        end_offset=start + 3,
        batch_size=2,
        draft_token_num=3,
        device="cpu",
    )
    assert got.dtype == torch.int64
    assert got.tolist() == [32, 33, 34, 7, 8, 9]


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch):
    from sglang.srt.mem_cache import memory_pool

    from sglang_dflash.platform.kv_pool import CpuMHATokenToKVPool

    def no_triton(*args: object, **kwargs: object) -> None:
        raise AssertionError("the CPU pool launched the Triton copy kernel")

    monkeypatch.setattr(memory_pool, "copy_all_layer_kv_cache_func", no_triton)
    made = CpuMHATokenToKVPool(
        size=64,
        page_size=16,
        dtype=torch.bfloat16,
        head_num=2,
        head_dim=8,
        layer_num=3,
        device="cpu",
        enable_memory_saver=False,
        enable_kv_cache_copy=True,
    )
    for buffer in (*made.k_buffer, *made.v_buffer):
        buffer.copy_(torch.randn(buffer.shape))
    return made


def test_move_with_overlapping_source_and_target(pool) -> None:
    before = [b.clone() for b in (*pool.k_buffer, *pool.v_buffer)]
    target, source = torch.tensor([20, 21, 22, 40]), torch.tensor([21, 22, 40, 20])
    pool.move_kv_cache(target, source)
    for old, new in zip(before, (*pool.k_buffer, *pool.v_buffer), strict=True):
        assert torch.equal(new[target], old[source])
        untouched = torch.ones(len(old), dtype=torch.bool)
        untouched[target] = False
        assert torch.equal(new[untouched], old[untouched])


def test_move_of_nothing(pool) -> None:
    before = pool.k_buffer[0].clone()
    pool.move_kv_cache(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    assert torch.equal(pool.k_buffer[0], before)


@pytest.mark.parametrize("k_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("v_dtype", [torch.bfloat16, torch.float32])
def test_write_converts_and_touches_one_layer(pool, k_dtype: torch.dtype, v_dtype: torch.dtype) -> None:
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    before = [b.clone() for b in pool.k_buffer]
    loc = torch.tensor([33, 17])
    k, v = torch.randn(2, 2, 2, 8)
    k, v = k.to(k_dtype), v.to(v_dtype)
    pool.set_kv_buffer(SimpleNamespace(layer_id=1), KVWriteLoc(loc, None), k, v)
    assert torch.equal(pool.k_buffer[1][loc], k.bfloat16())
    assert torch.equal(pool.v_buffer[1][loc], v.bfloat16())
    assert torch.equal(pool.k_buffer[0], before[0])
    assert torch.equal(pool.k_buffer[2], before[2])
