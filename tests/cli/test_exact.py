"""The rule that decides whether two outputs count as the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dflash.client.exact import Position, Verdict, first_difference, judge, tally, tolerance
from sglang_dflash.errors import UserError


@dataclass
class FixedOracle:
    """Plain decoding's distribution, given; remembers what it was asked."""

    best: list[tuple[int, float]]
    spread: float = 60.0
    asked: list[int] = field(default_factory=list)

    def at(self, prompt: Sequence[int], output: Sequence[int], index: int) -> Position:
        self.asked.append(index)
        return Position(self.best, self.spread)


@given(st.lists(st.integers(0, 9)), st.lists(st.integers(0, 9)))
def test_first_difference_is_the_end_of_the_common_prefix(left: list[int], right: list[int]) -> None:
    index = first_difference(left, right)
    if index is None:
        assert left == right
    else:
        assert left[:index] == right[:index]
        assert left[index : index + 1] != right[index : index + 1]


def test_equal_outputs_ask_nothing() -> None:
    oracle = FixedOracle([])
    assert judge(oracle, [1], [2, 3], [2, 3], "bfloat16") == Verdict("identical")
    assert oracle.asked == []


def test_a_difference_within_rounding_is_a_near_tie() -> None:
    oracle = FixedOracle([(7, -0.70), (8, -0.80), (9, -3.0)])
    verdict = judge(oracle, [1], [5, 7, 6], [5, 8, 8], "bfloat16")
    assert verdict.kind == "near-tie"
    assert verdict.ok
    assert (verdict.index, verdict.plain_token, verdict.other_token) == (1, 7, 8)
    assert verdict.gap == pytest.approx(0.10)
    assert oracle.asked == [1]


def test_the_same_gap_is_an_error_in_float32() -> None:
    oracle = FixedOracle([(7, -0.70), (8, -0.80)])
    assert judge(oracle, [1], [7], [8], "float32").kind == "different"


def test_a_gap_just_above_the_tolerance_is_an_error() -> None:
    limit = tolerance("bfloat16", 60.0)
    inside = FixedOracle([(7, 0.0), (8, -limit * 0.999)])
    outside = FixedOracle([(7, 0.0), (8, -limit * 1.001)])
    assert judge(inside, [1], [7], [8], "bfloat16").kind == "near-tie"
    assert judge(outside, [1], [7], [8], "bfloat16").kind == "different"


def test_a_third_token_is_an_error_though_the_top_two_tie() -> None:
    oracle = FixedOracle([(7, -0.70), (8, -0.71), (9, -4.0)])
    assert judge(oracle, [1], [7], [9], "bfloat16").kind == "different"


def test_a_token_out_of_plain_decodings_best_is_an_error() -> None:
    oracle = FixedOracle([(7, -0.70), (8, -0.71)])
    verdict = judge(oracle, [1], [7], [1234], "bfloat16")
    assert verdict.kind == "different"
    assert verdict.gap == float("inf")


def test_stopping_early_is_an_error_and_not_a_tie() -> None:
    oracle = FixedOracle([(7, -0.70), (8, -0.70)])
    verdict = judge(oracle, [1], [7, 8], [7], "bfloat16")
    assert verdict.kind == "different"
    assert verdict.other_token is None
    assert oracle.asked == []


def test_a_plain_token_that_plain_decoding_does_not_prefer_is_an_error() -> None:
    # The "plain" output itself is wrong by far: two wrong outputs must not excuse each other.
    oracle = FixedOracle([(1, 0.0), (7, -9.0), (8, -9.0)])
    assert judge(oracle, [1], [7], [8], "bfloat16").kind == "different"


def test_tolerance_follows_the_dtype_and_the_spread() -> None:
    # Two logits, each rounded in both decodings, at half the spread: 4 * 2^-8 * 30.
    assert tolerance("bfloat16", 60.0) == pytest.approx(4 * 30 / 256)
    assert tolerance("float16", 60.0) == pytest.approx(tolerance("bfloat16", 60.0) / 8)
    assert tolerance("float32", 60.0) < 1e-3
    with pytest.raises(UserError, match="no rounding rule"):
        tolerance("int4", 60.0)


def test_tally_counts_and_decides() -> None:
    run = [Verdict("identical"), Verdict("identical"), Verdict("near-tie", 3, 1, 2, 0.1, 0.4)]
    assert tally(run).ok
    assert str(tally(run)) == "2 of 3 identical (66.7 %), 1 near-ties, 0 different"
    assert not tally([*run, Verdict("different", 0, 1, 2, 9.0, 0.4)]).ok
