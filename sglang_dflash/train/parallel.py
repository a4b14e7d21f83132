"""Data parallelism under ``accelerate launch`` or ``torchrun``: plain averaged gradients."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn


def start() -> tuple[int, int]:
    """(rank, world size); joins the process group when a launcher started several processes."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), world


def is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def agree(value: float) -> float:
    """The main process's ``value`` in every process: clocks differ, loop ends must not."""
    if not dist.is_initialized():
        return value
    box = torch.tensor([value], dtype=torch.float64)
    if dist.get_backend() == "nccl":
        box = box.cuda()
    dist.broadcast(box, 0)
    return float(box)


def average_gradients(params: list[nn.Parameter]) -> None:
    """Mean of every gradient over the processes (one flat all-reduce)."""
    if not dist.is_initialized():
        return
    flat = torch.cat([p.grad.flatten() for p in params]).float()
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    at = 0
    for p in params:
        p.grad.copy_(flat[at : at + p.numel()].view_as(p))
        at += p.numel()
