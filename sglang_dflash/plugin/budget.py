"""The node budget when the operator names none: from a measured cost table, per platform.

A step of N nodes costs ``cost(N)`` milliseconds and commits ``accept(N)`` tokens; the budget is
the N with the most tokens per millisecond. Costs are measured (``benchmarks/cpu_pass_cost.py``),
accept lengths come from the embedded pair's evaluation (docs/training.md). Both are the embedded
pair's; another pair on CPU is served with the same rule until it is measured.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CostTable:
    """One target pass plus one drafter pass, by rows of the target pass."""

    rows: tuple[int, ...]
    ms: tuple[float, ...]
    source: str


# Accept length (tokens per target pass) of the embedded drafter by node budget, greedy, on
# benchmarks/prompts.jsonl, judged offline over 132 answers (docs/training.md).
ACCEPT = {8: 2.04, 16: 2.33, 32: 2.54}

# Target pass (benchmarks/cpu_pass_cost.py: 48.7, 60.1 and 88.1 ms in bfloat16; 59.8, 79.6 and 126.8 ms in
# float32) plus 16.5 ms for drafter, tree and commit, which a served step of 8 nodes took beside its pass.
_MACHINE = "SmolLM2-135M-Instruct, AMD EPYC (AVX-512), one thread, 2026-11-21"
CPU_TABLES = {
    "bfloat16": CostTable((8, 16, 32), (65.2, 76.6, 104.6), _MACHINE),
    "float32": CostTable((8, 16, 32), (76.3, 96.1, 143.3), _MACHINE),
}

# No GPU table has been measured yet. A verify pass is bound by weights and prefix up to a few dozen
# rows, so twice the block is the cautious choice until `make bench` on a GPU says more.
GPU_FACTOR = 2

# The greatest width where every step chooses its own: on no CPU measured did more rows ever pay.
CPU_GREATEST = 16


def best_nodes(table: CostTable) -> int:
    rate = {rows: ACCEPT[rows] / ms for rows, ms in zip(table.rows, table.ms, strict=True)}
    return max(rate, key=lambda rows: rate[rows])


def default_nodes(*, device: str, dtype: str, block: int, pinned: bool) -> int:
    """Node budget N, root included.

    Args:
        device: SGLang's device string.
        dtype: the target's dtype as SGLang names it ("auto", "bfloat16", "float32", ...).
        block: the drafter's block size B.
        pinned: every step takes the whole budget; else the budget is only the most that a step may take.
    """
    if device.startswith("cuda"):
        return GPU_FACTOR * block
    if not pinned:
        return CPU_GREATEST
    table = CPU_TABLES.get("float32" if dtype in ("float32", "float") else "bfloat16")
    assert table is not None
    return best_nodes(table)
