"""The widths that a step can have."""

from __future__ import annotations

# Rows verified per request; on CUDA each has a captured graph. 1 is the plain step.
TIERS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


def tiers_up_to(nodes: int) -> tuple[int, ...]:
    """The tiers up to ``nodes``, which is one itself whatever it is."""
    return (*(n for n in TIERS if n < nodes), nodes)
