"""A byte-and-operation model of the kernels on an H200; prints the prediction tables of docs/kernels.md.

    python benchmarks/kernel_model.py

Every constant below is an assumption from public data sheets or from experience with kernels of this kind,
not a measurement of these kernels. benchmarks/kernels.py prints the prediction beside what it measures.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from dflash_kernels.tree_attn.configs import choose_splits, tile_config

SMS = 132
HBM = 4.8e12  # bytes/s, data sheet
HBM_SHARE = 0.88  # what a well-fed streaming kernel reaches
L2 = 5.5e12  # bytes/s from L2 to the multiprocessors
TENSOR = 989e12  # dense bf16 operations/s, data sheet
TENSOR_SHARE = 0.5  # attention in Triton without warp specialisation, softmax included
LAUNCH = 2.5e-6  # one kernel inside a CUDA graph, drain and fill included


@dataclass(frozen=True)
class Prediction:
    """Seconds of one layer, what bounds it, and the plan behind it."""

    seconds: float
    floor: float
    bound: str
    splits: int
    row_blocks: int


def predict(
    q_heads: int, kv_heads: int, dim: int, bs: int, ctx: int, nodes: int, kv_bytes: int
) -> Prediction:
    """Tree attention of one layer; kv_bytes is the cache's element size."""
    rows = nodes * (q_heads // kv_heads)
    config = tile_config(90, dim, rows, kv_bytes)
    blocks = -(-rows // config.block_m)
    programs = bs * kv_heads * blocks
    splits = choose_splits(programs, SMS, config.per_sm)
    cache = bs * ctx * kv_heads * 2 * dim * kv_bytes
    operations = 4 * bs * kv_heads * blocks * config.block_m * ctx * dim
    parts = {
        "HBM": cache / (HBM * HBM_SHARE),
        "L2": blocks * cache / L2,
        "tensor cores": operations / (TENSOR * TENSOR_SHARE),
    }
    bound = max(parts, key=lambda name: parts[name])
    slots = SMS * config.per_sm
    filled = programs * splits / (-(-programs * splits // slots) * slots)
    seconds = parts[bound] / filled + LAUNCH
    if splits > 1:
        seconds += 2 * bs * kv_heads * splits * rows * dim * 4 / HBM + LAUNCH
    return Prediction(seconds, cache / HBM, bound, splits, blocks)


LONG = ((1, 8192), (1, 32768), (1, 131072), (16, 8192), (64, 8192))
SHORT = ((1, 32768), (64, 8192))


def main() -> None:
    columns = ("heads", "KV", "bs", "ctx", "N", "floor µs", "predicted µs", "of floor", "bound by", "splits")
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for q, kv, name, size, shapes in (
        (32, 8, "bf16", 2, LONG),
        (32, 4, "bf16", 2, SHORT),
        (32, 8, "fp8", 1, SHORT),
    ):
        for (bs, ctx), nodes in product(shapes, (16, 32, 64)):
            p = predict(q, kv, 128, bs, ctx, nodes, size)
            cells = (f"{q}/{kv}", name, bs, ctx, nodes, f"{p.floor * 1e6:.1f}", f"{p.seconds * 1e6:.1f}")
            cells = (*cells, f"{p.floor / p.seconds:.0%}", p.bound, p.splits)
            print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
