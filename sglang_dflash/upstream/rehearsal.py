"""Decode steps before the first request: what a step of each width takes on this machine.

A rehearsed step is the real one over requests that nobody sent. Its slots belong to nobody: the pool is
empty when this runs, and what is written there is overwritten before it can be read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

_FEW = 256  # cached tokens of a request


def room(target: Any, slots: int) -> tuple[int, int]:
    """(requests, cached tokens of each) that a rehearsal can have at most.

    Requests: as many as hold ``_FEW`` tokens each. More can run, but not for long, and a pass over all
    rows of the table would take longer than all the others together.

    Args:
        target: SGLang's target ``ModelRunner``.
        slots: KV slots that the widest step writes.
    """
    pool = target.req_to_token_pool
    longest = min(int(target.model_config.context_len), pool.req_to_token.shape[1]) - slots
    most = int(target.token_to_kv_pool_allocator.size) // _FEW
    return max(1, min(int(pool.size) - 1, most)), max(1, longest)


@contextmanager
def rehearsal(worker: Any, requests: int, length: int, slots: int) -> Iterator[Any]:
    """A batch of ``requests`` requests with ``length`` cached tokens each, for the length of the block.

    Args:
        worker: the tree worker, with its memory pools.
        slots: KV slots past the cached tokens that a step may write.
    """
    target = worker.target_worker.model_runner
    table = target.req_to_token_pool.req_to_token
    device = table.device
    rows = torch.arange(1, requests + 1, device=device)  # row 0 pads batches
    before = table[rows].clone()
    columns = length + slots
    # Slot 0 takes what padding writes; requests share slots where the pool is small.
    span = int(target.token_to_kv_pool_allocator.size) - 1
    table[rows, :columns] = 1 + torch.arange(requests * columns, device=device).view(requests, -1).to(
        table.dtype
    ).remainder(span)
    lens = torch.full((requests,), length, dtype=torch.int64, device=device)
    batch = ScheduleBatch(
        reqs=[],
        req_to_token_pool=target.req_to_token_pool,
        token_to_kv_pool_allocator=target.token_to_kv_pool_allocator,
        model_config=target.model_config,
        device=device,
        spec_algorithm=SpeculativeAlgorithm.DFLASH,
        forward_mode=ForwardMode.DECODE,
        req_pool_indices=rows,
        seq_lens=lens,
        seq_lens_cpu=lens.cpu(),
        seq_lens_sum=requests * length,
        spec_info=worker._make_next_draft_input_decode(bonus_tokens=torch.ones_like(lens), new_seq_lens=lens),
    )
    try:
        yield batch
    finally:
        table[rows] = before
