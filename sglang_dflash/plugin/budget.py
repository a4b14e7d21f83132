"""The node budget when the operator names none: from a measured cost table, per platform.

A step of N nodes costs ``cost(N)`` milliseconds and commits ``accept(N)`` tokens; the budget is
the N with the most tokens per millisecond. Costs are measured (``benchmarks/cpu_pass_cost.py``),
accept lengths come from the embedded pair's evaluation (docs/training.md).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CostTable:
    """One target pass plus one drafter pass, by rows of the target pass."""

    rows: tuple[int, ...]
    ms: tuple[float, ...]
    source: str


# Accept length (tokens per target pass) of the embedded drafter by node budget, greedy, held out.
ACCEPT = {8: 2.2, 16: 2.5, 32: 2.8}

CPU_TABLES = {
    "bfloat16": CostTable((8, 16, 32), (78.0, 94.0, 115.0), "SmolLM2-135M, one thread"),
    "float32": CostTable((8, 16, 32), (120.0, 145.0, 191.0), "SmolLM2-135M, one thread"),
}

# No GPU table has been measured yet. A verify pass is bound by weights and prefix up to a few dozen
# rows, so twice the block is the cautious choice until `make bench` on a GPU says more.
GPU_FACTOR = 2


def best_nodes(table: CostTable) -> int:
    rate = {rows: ACCEPT[rows] / ms for rows, ms in zip(table.rows, table.ms, strict=True)}
    return max(rate, key=lambda rows: rate[rows])


def default_nodes(*, device: str, dtype: str, block: int) -> int:
    """Node budget N, root included.

    Args:
        device: SGLang's device string.
        dtype: the target's dtype as SGLang names it ("auto", "bfloat16", "float32", ...).
        block: the drafter's block size B; the budget is never below it, so that the spine fits.
    """
    if device.startswith("cuda"):
        return GPU_FACTOR * block
    table = CPU_TABLES.get("float32" if dtype in ("float32", "float") else "bfloat16")
    assert table is not None
    return max(block, best_nodes(table))
