"""Expected tokens: priors, learning, what one block and one kind of request tells of the others."""

import random
from itertools import pairwise

import numpy as np
import pytest

from sglang_dflash.errors import UserError
from sglang_dflash.step.width import PLAIN, Width
from sglang_dflash.worker.width.gain import Gains
from sglang_dflash.worker.width.prior import generic, lucky, power_for
from sglang_dflash.worker.width.tiers import TIERS

WIDTHS = [Width(2, 2), Width(4, 3), Width(8, 6), Width(32, 6)]


def reach(width: Width, power: float) -> np.ndarray:
    return lucky(generic(TIERS, width.depth), power)


def tokens(width: Width, power: float) -> float:
    return 1.0 + float(reach(width, power)[TIERS.index(width.nodes)].sum())


def serve(gains, width, steps, power=1.0, says=1.0, requests=4, sampled=False, seed=0, tiers=len(TIERS)):
    """Steps of a drafter that is so lucky and says ``says`` times what is true."""
    rng = random.Random(seed)
    by_tier = reach(width, power)
    mine = by_tier[TIERS.index(width.nodes)]
    for _ in range(steps):
        mass = np.zeros((2, tiers, width.depth))
        mass[int(sampled)] = np.minimum(by_tier[:tiers] * says * rng.uniform(0.7, 1.3), 1.0) * requests
        got = []
        for _ in range(requests):
            luck = rng.random()
            got.append(1 + sum(luck < chance for chance in mine))
        gains.observe(width, [sampled] * requests, got, mass.tolist())


def test_a_plain_step_brings_one_token():
    assert Gains(6).tokens(PLAIN, 0.3) == 1.0


def test_prior_grows_with_nodes_and_depth_and_stays_possible():
    gains = Gains(8)
    for b in range(2, 9):
        row = [gains.tokens(Width(n, b), 0.0) for n in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)]
        assert all(a <= b for a, b in pairwise(row))
        assert 1.2 < row[0] < 2.0
        assert row[-1] <= b
    deep = [gains.tokens(Width(16, b), 0.0) for b in range(2, 9)]
    assert all(a <= b + 1e-9 for a, b in pairwise(deep))
    assert gains.tokens(Width(10, 6), 0.0) == pytest.approx(
        (gains.tokens(Width(8, 6), 0.0) + gains.tokens(Width(12, 6), 0.0)) / 2
    )


def test_an_evaluation_sets_where_it_starts():
    gains = Gains(6, {"8x6": 2.6, "2x6": 1.6}, {"8x6": 1.8})
    assert gains.tokens(Width(8, 6), 0.0) == pytest.approx(2.6, abs=0.01)
    assert gains.tokens(Width(2, 6), 0.0) == pytest.approx(1.6, abs=0.01)
    assert gains.tokens(Width(8, 6), 1.0) == pytest.approx(1.8, abs=0.01)
    assert gains.tokens(Width(8, 6), 0.5) == pytest.approx(2.2, abs=0.02)
    # Where sampled requests were not evaluated they start as the greedy ones.
    assert Gains(6, {"8x6": 2.6}).tokens(Width(8, 6), 1.0) == pytest.approx(2.6, abs=0.01)


@pytest.mark.parametrize("stored", [{"8": 2.0}, {"8x6": 7.0}, {"8x6": 0.5}, {"ax6": 2.0}, {"1x6": 1.0}])
def test_an_impossible_evaluation_is_refused(stored):
    with pytest.raises(UserError, match="tree_accept"):
        Gains(6, stored)


def test_power_for_hits_its_mark():
    row = generic(TIERS, 5)[TIERS.index(8)]
    for goal in (1.2, 2.0, 3.5):
        assert 1.0 + lucky(row, power_for(row, goal)).sum() == pytest.approx(goal, abs=1e-3)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("says", [0.7, 1.0, 1.25])
def test_learns_what_the_width_in_force_brings(power, says):
    gains = Gains(6)
    serve(gains, Width(8, 6), 400, power, says)
    assert gains.tokens(Width(8, 6), 0.0) == pytest.approx(tokens(Width(8, 6), power), rel=0.06)


@pytest.mark.parametrize("power", [0.5, 2.0])
def test_other_widths_share_the_luck(power):
    gains = Gains(6)
    serve(gains, Width(8, 6), 400, power, 0.8)
    for width in WIDTHS:
        assert gains.tokens(width, 0.0) == pytest.approx(tokens(width, power), rel=0.12)
    # What a short block shows of the text holds for a long one, less exactly.
    gains = Gains(6)
    serve(gains, Width(4, 3), 400, power, 0.8)
    assert gains.tokens(Width(8, 6), 0.0) == pytest.approx(tokens(Width(8, 6), power), rel=0.25)
    usual = Gains(6).tokens(Width(8, 6), 0.0)
    assert (gains.tokens(Width(8, 6), 0.0) > usual) == (power < 1)


def test_greedy_and_sampled_are_apart():
    gains = Gains(6)
    serve(gains, Width(8, 6), 200, 0.5)
    assert gains.tokens(Width(8, 6), 1.0) == Gains(6).tokens(Width(8, 6), 1.0)
    serve(gains, Width(8, 6), 200, 2.0, sampled=True)
    assert gains.tokens(Width(8, 6), 0.0) > 1.3 * gains.tokens(Width(8, 6), 1.0)


def test_a_mixed_batch_teaches_both():
    gains = Gains(6)
    width = Width(8, 6)
    lucky_one, other = reach(width, 0.4), reach(width, 2.5)
    for _ in range(300):
        mass = np.stack([lucky_one * 2, other])
        gains.observe(width, [False, True, False], [4, 1, 3], mass)
    assert gains.tokens(width, 0.0) == pytest.approx(3.5, rel=0.1)
    assert gains.tokens(width, 1.0) == pytest.approx(1.0, abs=0.25)


def test_a_block_that_drafts_worse_is_found_out():
    """Every second stretch is drafted by a block of 3 whose first guess is worse than a block of 6's."""
    gains = Gains(6)
    rng = random.Random(0)
    long, short = Width(8, 6), Width(8, 3)
    for i in range(2000):
        width, power = (long, 1.0) if i % 20 < 10 else (short, 1.6)
        by_tier = reach(width, power)
        luck = rng.random()
        got = 1 + sum(luck < chance for chance in by_tier[TIERS.index(8)])
        gains.observe(width, [False], [got], np.stack([by_tier, 0 * by_tier]))
    assert gains.tokens(long, 0.0) == pytest.approx(tokens(long, 1.0), rel=0.06)
    assert gains.tokens(short, 0.0) == pytest.approx(tokens(short, 1.6), rel=0.06)


def test_follows_a_text_that_changes():
    gains = Gains(6)
    serve(gains, Width(8, 6), 400, 2.0, requests=1)
    serve(gains, Width(8, 6), 150, 0.5, requests=1)
    assert gains.tokens(Width(8, 6), 0.0) == pytest.approx(tokens(Width(8, 6), 0.5), rel=0.12)


def test_a_text_of_another_kind_is_noticed():
    """Ten steps of four requests are enough, where a plain average of a hundred would be half way."""
    gains = Gains(6)
    serve(gains, Width(8, 6), 100, 0.6)
    assert gains.turns == 0
    before, after = tokens(Width(8, 6), 0.6), tokens(Width(8, 6), 1.6)
    serve(gains, Width(8, 6), 10, 1.6)
    assert gains.turns > 0
    assert gains.tokens(Width(8, 6), 0.0) - after < 0.3 * (before - after)


def test_a_text_that_wavers_is_seldom_taken_for_another():
    gains = Gains(6)
    for seed in range(10):
        serve(gains, Width(8, 6), 200, 1.0, seed=seed, requests=1)
    assert gains.turns <= 2


def test_tiers_that_were_not_computed_follow():
    gains = Gains(6)
    serve(gains, Width(4, 4), 400, 0.5, tiers=5)  # up to 6 nodes
    assert gains.tokens(Width(4, 4), 0.0) == pytest.approx(tokens(Width(4, 4), 0.5), rel=0.05)
    assert gains.tokens(Width(32, 4), 0.0) > Gains(6).tokens(Width(32, 4), 0.0)
    assert gains.tokens(Width(6, 4), 0.0) <= gains.tokens(Width(8, 4), 0.0) <= 4


def test_ended_requests_and_broken_drafts_do_no_harm():
    gains = Gains(6)
    before = gains.tokens(Width(8, 6), 0.0)
    gains.observe(Width(8, 6), [False, False], [0, 0], np.zeros((2, 14, 5)))
    gains.observe(Width(8, 6), [False], [1], np.full((2, 14, 5), np.nan))
    gains.observe(PLAIN, [False] * 3, [1, 1, 1], None)
    gains.observe(Width(8, 6), [], [], np.zeros((2, 14, 5)))
    assert gains.tokens(Width(8, 6), 0.0) == pytest.approx(before, rel=0.01)
    with pytest.raises(ValueError, match="mass"):
        gains.observe(Width(8, 6), [False], [1], np.zeros((14, 5)))


def test_doubt_of_the_text_grows_while_nothing_is_drafted():
    gains = Gains(6)
    serve(gains, Width(8, 6), 50)
    _, known = gains.doubt(6, 0.0)
    for _ in range(1000):
        gains.observe(PLAIN, [False], [1], None)
    own, later = gains.doubt(6, 0.0)
    assert later > 3 * known
    assert own > 0


def test_state_makes_another_rank_alike():
    first, second = Gains(6), Gains(6)
    serve(first, Width(8, 6), 100, 0.6)
    second.load(first.state())
    for width in WIDTHS:
        assert first.tokens(width, 0.2) == second.tokens(width, 0.2)
    serve(first, Width(4, 3), 20, 0.6, seed=5)
    serve(second, Width(4, 3), 20, 0.6, seed=5)
    assert first.state() == second.state()
    with pytest.raises(ValueError, match="state"):
        Gains(5).load(first.state())
