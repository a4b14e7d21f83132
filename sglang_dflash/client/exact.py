"""What "the same output" means, in numbers.

Greedy decoding with draft trees gives the target's own tokens. A verify pass multiplies matrices of
other shapes than a decode pass, so in a rounded dtype the two see logits that differ in the last
bits, in every engine. Where plain decoding's two best tokens lie closer than that, either is the
target's output. Everything else is an error.

A first difference is a *near-tie* when ``gap <= tolerance`` with

* ``gap``: plain decoding's logit of its own token minus its logit of the other output's token
  (log-probabilities differ by the same amount as logits do);
* ``tolerance = 4 * u * s / 2``: the two logits are each rounded in each of the two decodings, four
  roundings, each at most ``u * |logit|``. ``u`` is :data:`ROUNDOFF` of the dtype. Log-probabilities
  do not tell ``|logit|``, so half the spread ``s`` (greatest minus least logit over the vocabulary)
  stands for it: no vector of that spread has a smaller largest magnitude, so the rule errs on the
  strict side.

After the first difference two outputs are different texts, so nothing behind it is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import httpx

from sglang_dflash.client import access
from sglang_dflash.errors import UserError

# Largest relative error of one logit. bf16 and fp16 products accumulate in float32 and round once:
# the unit roundoff 2^-8 and 2^-11. A float32 product rounds at every addition; errors of a random
# walk over some thousand additions grow by about 2^5: 2^-24 * 2^5.
ROUNDOFF: dict[str, float] = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-19}
_ROUNDINGS = 4

# How many of plain decoding's best tokens are asked for at the first difference.
TOP = 20


def first_difference(plain: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token that differs, None when the sequences are equal.

    A sequence that is a strict prefix of the other differs at its own length.
    """
    for index, (left, right) in enumerate(zip(plain, other, strict=False)):
        if left != right:
            return index
    return None if len(plain) == len(other) else min(len(plain), len(other))


def tolerance(dtype: str, spread: float) -> float:
    """Largest logit gap that rounding in ``dtype`` can close.

    Args:
        dtype: "bfloat16", "float16" or "float32": what the target computes its logits in.
        spread: greatest minus least logit over the vocabulary at that position.
    """
    if dtype not in ROUNDOFF:
        raise UserError(f"no rounding rule for dtype {dtype!r}; known: {', '.join(ROUNDOFF)}")
    return _ROUNDINGS * ROUNDOFF[dtype] * spread / 2


@dataclass(frozen=True)
class Position:
    """Plain decoding at one position: its best tokens with log-probabilities, and the spread."""

    best: list[tuple[int, float]]
    spread: float


class Oracle(Protocol):
    """Answers what plain decoding saw at a position."""

    def at(self, prompt: Sequence[int], output: Sequence[int], index: int) -> Position:
        """The distribution from which ``output[index]`` was taken after ``prompt + output[:index]``."""
        ...


@dataclass(frozen=True)
class Verdict:
    """One output compared with plain decoding's.

    ``kind`` is "identical", "near-tie" (explained by rounding) or "different" (an error).
    ``index``, ``plain_token``, ``other_token``, ``gap`` and ``tolerance`` describe the first
    difference; tokens are None past a sequence's end, ``gap`` is infinite where plain decoding
    does not have the other token among its best :data:`TOP`.
    """

    kind: Literal["identical", "near-tie", "different"]
    index: int | None = None
    plain_token: int | None = None
    other_token: int | None = None
    gap: float | None = None
    tolerance: float | None = None

    @property
    def ok(self) -> bool:
        return self.kind != "different"

    def __str__(self) -> str:
        if self.kind == "identical":
            return "identical"
        return (
            f"{self.kind} at token {self.index}: plain {self.plain_token}, other {self.other_token}, "
            f"logit gap {self.gap:.4g}, rounding allows {self.tolerance:.4g}"
        )


def judge(
    oracle: Oracle, prompt: Sequence[int], plain: Sequence[int], other: Sequence[int], dtype: str
) -> Verdict:
    """Compare two greedy outputs for the same prompt; all arguments are token ids.

    Asks ``oracle`` only where the outputs differ.
    """
    index = first_difference(plain, other)
    if index is None:
        return Verdict("identical")
    left = plain[index] if index < len(plain) else None
    right = other[index] if index < len(other) else None
    if left is None or right is None:
        # One stopped where the other went on without having differed: never a matter of rounding.
        return Verdict("different", index, left, right, float("inf"), 0.0)
    position = oracle.at(prompt, plain, index)
    logprobs = dict(position.best)
    allowed = tolerance(dtype, position.spread)
    if left not in logprobs or right not in logprobs:
        return Verdict("different", index, left, right, float("inf"), allowed)
    gap = abs(logprobs[left] - logprobs[right])
    # Plain decoding must itself have had its token on top, but for the same rounding.
    behind = max(logprobs.values()) - logprobs[left]
    kind: Literal["near-tie", "different"] = "near-tie" if max(gap, behind) <= allowed else "different"
    return Verdict(kind, index, left, right, max(gap, behind), allowed)


class ServerOracle:
    """Asks a running *plain* SGLang server over its native ``/generate`` endpoint.

    First decodes the prompt again up to the position, so that the gap is the one plain decoding
    itself saw; if it does not come to the same tokens (another batch, another rounding), the
    position is computed by prefilling the prefix.
    """

    def __init__(self, url: str, vocab_size: int, timeout: float = 600.0) -> None:
        self._http = httpx.Client(base_url=url, headers=access.headers(), timeout=timeout, trust_env=False)
        self._vocab_size = vocab_size

    def close(self) -> None:
        self._http.close()

    def _generate(self, ids: list[int], new_tokens: int, top: int) -> dict:
        reply = self._http.post(
            "/generate",
            json={
                "input_ids": ids,
                "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
                "return_logprob": True,
                "top_logprobs_num": top,
            },
        )
        reply.raise_for_status()
        return reply.json()

    def at(self, prompt: Sequence[int], output: Sequence[int], index: int) -> Position:
        again = self._generate(list(prompt), index + 1, TOP)
        step = again
        if list(again["output_ids"][:index]) != list(output[:index]):
            step = self._generate([*prompt, *output[:index]], 1, TOP)
        best = [
            (int(token), float(value)) for value, token, *_ in step["meta_info"]["output_top_logprobs"][-1]
        ]
        everything = self._generate([*prompt, *output[:index]], 1, self._vocab_size)
        values = [float(entry[0]) for entry in everything["meta_info"]["output_top_logprobs"][-1]]
        return Position(best, max(values) - min(values))


@dataclass(frozen=True)
class Tally:
    """Verdicts of a run, counted."""

    identical: int
    near_ties: int
    different: int

    @property
    def total(self) -> int:
        return self.identical + self.near_ties + self.different

    @property
    def ok(self) -> bool:
        return self.different == 0

    def __str__(self) -> str:
        share = 100.0 * self.identical / self.total if self.total else 0.0
        return (
            f"{self.identical} of {self.total} identical ({share:.1f} %), "
            f"{self.near_ties} near-ties, {self.different} different"
        )


def tally(verdicts: Sequence[Verdict]) -> Tally:
    kinds = [verdict.kind for verdict in verdicts]
    return Tally(kinds.count("identical"), kinds.count("near-tie"), kinds.count("different"))
