"""Stored tile configurations and launch planning; nothing is tuned at serving time.

Every entry passed ahead-of-time compilation for its architecture without spills (tests/kernels/test_aot.py).
The reasons for the shapes, and the command that re-measures them, are in docs/kernels.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch


@dataclass(frozen=True)
class TileConfig:
    """One stage-1 specialisation.

    Attributes:
        block_m: query rows (nodes x GQA group) per program.
        block_n: KV tokens per iteration.
        warps, stages: Triton's num_warps and num_stages.
        per_sm: programs that fit one SM, by shared memory and registers; sizes the grid.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    per_sm: int

    @property
    def fused_warps(self) -> int:
        """Warps of the one-split launch, which also holds the draft block's rows in registers."""
        return 8


# (architecture, head dim bucket, row bucket) for 16-bit caches; sm_100 takes sm_90's entries unless it has
# its own. The pipeliner spends two stages per tile in flight, one for the slot indices and one for the rows
# they name: 5 keeps two tiles in flight, 7 three, and fewer than 5 none. Dim 256 stops at 64 rows (32 on
# sm_80): 128 rows of float32 accumulator would take every register of eight warps.
_TABLE: dict[tuple[int, int, int], TileConfig] = {
    (80, 64, 16): TileConfig(16, 64, 4, 5, 3),
    (80, 64, 32): TileConfig(32, 64, 4, 5, 3),
    (80, 64, 64): TileConfig(64, 64, 4, 5, 2),
    (80, 64, 128): TileConfig(128, 64, 8, 5, 1),
    (80, 128, 16): TileConfig(16, 32, 4, 5, 3),
    (80, 128, 32): TileConfig(32, 32, 4, 5, 3),
    (80, 128, 64): TileConfig(64, 32, 4, 5, 2),
    (80, 128, 128): TileConfig(128, 32, 8, 5, 1),
    (80, 256, 16): TileConfig(16, 32, 4, 5, 2),
    (80, 256, 32): TileConfig(32, 32, 4, 5, 1),
    (80, 256, 64): TileConfig(32, 32, 4, 5, 1),
    (90, 64, 16): TileConfig(16, 128, 4, 5, 3),
    (90, 64, 32): TileConfig(32, 128, 4, 5, 2),
    (90, 64, 64): TileConfig(64, 128, 4, 5, 2),
    (90, 64, 128): TileConfig(128, 64, 8, 7, 1),
    (90, 128, 16): TileConfig(16, 64, 4, 5, 3),
    (90, 128, 32): TileConfig(32, 64, 4, 5, 2),
    (90, 128, 64): TileConfig(64, 64, 4, 5, 2),
    (90, 128, 128): TileConfig(128, 64, 8, 7, 1),
    (90, 256, 16): TileConfig(16, 32, 4, 5, 3),
    (90, 256, 32): TileConfig(32, 32, 4, 5, 2),
    (90, 256, 64): TileConfig(64, 32, 8, 7, 1),
    (100, 128, 64): TileConfig(64, 64, 4, 7, 1),
}
# One-byte caches whose 16-bit entry with two more stages would spill.
_ONE_BYTE: dict[tuple[int, int, int], TileConfig] = {
    (100, 64, 16): TileConfig(16, 64, 4, 7, 3),
    (100, 128, 32): TileConfig(32, 64, 4, 5, 2),
}
# float32 dots run on the plain cores; small tiles keep their operands in registers.
_FLOAT32 = TileConfig(16, 32, 4, 3, 1)
_SMS = {80: 108, 90: 132, 100: 148}
MAX_SPLITS = 64
MIN_CHUNK = 128  # tokens; below this a split costs more in its merge than it saves


def architecture(device: torch.device) -> int:
    """The table's architecture for a device: 80, 90 or 100 (the interpreter takes 90)."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 10:
        return 100
    return 90 if (major, minor) >= (9, 0) else 80


@lru_cache(maxsize=8)
def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    if device.type != "cuda":
        return _SMS[90]
    return torch.cuda.get_device_properties(device).multi_processor_count


def bucket(value: int, sizes: tuple[int, ...]) -> int:
    """The smallest size that holds `value`, or the largest."""
    return next((s for s in sizes if value <= s), sizes[-1])


def tile_config(arch: int, head_dim: int, rows: int, kv_bytes: int = 2) -> TileConfig:
    """Stage-1 tiles for `rows` = nodes x GQA group query rows per KV head, and a cache's element size.

    Raises:
        ValueError: head_dim is above 256.
    """
    if head_dim > 256:
        raise ValueError(f"head dim {head_dim} is above the kernel's 256")
    if kv_bytes == 4:
        return _FLOAT32
    dim = bucket(head_dim, (64, 128, 256))
    sizes = (16, 32, 64) if dim == 256 else (16, 32, 64, 128)  # the table's row buckets
    rows = bucket(rows, sizes)
    if kv_bytes == 1 and (arch, dim, rows) in _ONE_BYTE:
        return _ONE_BYTE[arch, dim, rows]
    config = _TABLE.get((arch, dim, rows)) or _TABLE[min(arch, 90), dim, rows]
    # One-byte rows leave half the bytes in flight at the same depth: two more stages make up for it.
    return replace(config, stages=config.stages + 2) if kv_bytes == 1 else config


def choose_splits(programs: int, sms: int, per_sm: int) -> int:
    """KV splits per request, from static shapes alone.

    Args:
        programs: stage-1 programs of one split (requests x KV heads x row blocks).

    The time of a memory-bound grid is its waves over its splits; every split adds its share of partial
    results to write and merge (about 1 % of a long prefix each).
    """
    slots = sms * per_sm
    best, best_cost = 1, float("inf")
    for splits in range(1, MAX_SPLITS + 1):
        waves = -(-programs * splits // slots)
        cost = waves / splits * (1.0 + 0.01 * (splits - 1))
        if cost < best_cost - 1e-9:
            best, best_cost = splits, cost
    return best


def plan_splits(bs: int, num_kv_heads: int, rows: int, config: TileConfig, device: torch.device) -> int:
    """KV splits for a batch size; a function of static shapes and the device only."""
    programs = bs * num_kv_heads * -(-rows // config.block_m)
    return choose_splits(programs, sm_count(device), config.per_sm)
