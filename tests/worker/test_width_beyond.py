"""What recalled text is expected to bring past the drafter's block."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_dflash.step.width import PLAIN, Width
from sglang_dflash.worker.width.beyond import Beyond
from sglang_dflash.worker.width.gain import Gains
from sglang_dflash.worker.width.policy import WidthPolicy
from sglang_dflash.worker.width.tiers import TIERS
from tests.worker.width_world import LENGTH, step_ms, table

DEEPEST = 15
CERTAIN = np.stack([np.full(DEEPEST, 0.9) ** np.arange(1, DEEPEST + 1), np.zeros(DEEPEST)])


def test_what_lies_past_the_block_and_in_the_tree_counts() -> None:
    beyond = Beyond(DEEPEST)
    for _ in range(300):
        beyond.observe(Width(4, 4), [False], [4], CERTAIN)
    for width in (Width(8, 6), Width(16, 6), Width(16, 3)):
        want = CERTAIN[0, width.block - 1 : width.nodes - 1].sum()
        assert beyond.tokens(0, width) == pytest.approx(want, rel=0.01)
        assert beyond.tokens(1, width) == 0.0
    # A tree no deeper than its block has no room past it; a plain step has no tree.
    assert beyond.tokens(0, Width(6, 6)) == beyond.tokens(0, Width(4, 6)) == beyond.tokens(0, PLAIN) == 0.0


def test_a_chain_that_says_too_much_is_put_right() -> None:
    beyond, width = Beyond(DEEPEST), Width(16, 6)
    for i in range(600):
        beyond.observe(width, [False], [8 if i % 2 else 1], CERTAIN)  # 2 past the block every other step
    assert beyond.tokens(0, width) == pytest.approx(1.0, rel=0.1)


def test_it_ends_soon_after_the_copy() -> None:
    beyond, width = Beyond(DEEPEST), Width(16, 6)
    for _ in range(100):
        beyond.observe(width, [False], [16], CERTAIN)
    before = beyond.tokens(0, width)
    for _ in range(60):
        beyond.observe(width, [False], [2], np.zeros((2, 0)))
    assert beyond.tokens(0, width) < 0.2 * before


def test_broken_numbers_and_ended_requests_teach_nothing() -> None:
    beyond, width = Beyond(DEEPEST), Width(16, 6)
    beyond.observe(width, [], [], CERTAIN)
    beyond.observe(width, [False], [3], np.full((2, DEEPEST), np.nan))
    assert beyond.tokens(0, width) == 0.0
    beyond.observe(width, [False, False], [0, 0], 2 * CERTAIN)
    assert 0.0 < beyond.tokens(0, width) < CERTAIN[0, 5:].sum()


def chosen(copying: bool) -> Width:
    """After 400 steps of a drafter that is as good at 8 nodes as at 32, on a machine where 16 rows cost as
    much as 8, and 32 a third more; ``copying`` beside a chain that goes on past all."""
    deepest = 31
    policy = WidthPolicy(Width(32, 6), table(), Gains(6, recalled=deepest))
    depths = np.array([0.8, 0.6, 0.45, 0.3, 0.2])
    for _ in range(400):
        width = policy.choose(1, LENGTH, 0.0)
        policy.cost.observe(width, 1, LENGTH, step_ms(width, 1))
        mass = np.zeros((2, len(TIERS), width.depth))
        mass[0] = depths[: width.depth]
        got = width.nodes if copying else 1 + round(float(depths[: width.drafted].sum()))
        held = np.stack([np.full(deepest, 0.97) ** np.arange(1, deepest + 1), np.zeros(deepest)])
        known = None if width.plain else mass
        policy.gains.observe(width, [False], [got], known, held if copying and not width.plain else None)
    return policy.choose(1, LENGTH, 0.0)


def test_a_copy_is_followed_with_wider_trees() -> None:
    assert chosen(copying=True).nodes == 32
    assert chosen(copying=False).nodes < 32


def test_ranks_share_it() -> None:
    first, second = Gains(6, recalled=DEEPEST), Gains(6, recalled=DEEPEST)
    mass = np.full((2, len(TIERS), 5), 0.3)
    for _ in range(50):
        first.observe(Width(16, 6), [False], [9], mass, CERTAIN)
    second.load(first.state())
    assert second.tokens(Width(16, 6), 0.0) == first.tokens(Width(16, 6), 0.0)
    with pytest.raises(ValueError, match="not the state"):
        Gains(6).load(first.state())
