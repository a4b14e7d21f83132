"""A target's exact sampling distribution, computed outside the server, and chi-square tests against it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

#: Cells with fewer expected counts are pooled; the chi-square approximation asks for 5.
EXPECTED = 10.0
#: A filter's edge this near to a token's probability may fall on either side by rounding.
EDGE = 1e-5
BINS = 20


@dataclass(frozen=True)
class Rule:
    """Sampling parameters; top_k 0 means off."""

    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def params(self) -> dict[str, Any]:
        """For a request, without the filters that are off."""
        filters = {"top_k": self.top_k or None, "top_p": self.top_p, "min_p": self.min_p or None}
        on = {name: value for name, value in filters.items() if value not in (None, 1.0)}
        return {"temperature": self.temperature, **on}

    def at(self, temperature: float) -> Rule:
        return replace(self, temperature=temperature)

    def unfiltered(self) -> Rule:
        return Rule(self.temperature)


def distribution(logits: torch.Tensor, rule: Rule) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised probabilities float64 [n, V], and bool [n]: no filter's edge is within rounding.

    As SGLang words it: temperature first; each filter looks at the probabilities before any other.
    """
    probs = torch.softmax(logits.double() / rule.temperature, dim=-1)
    ranked, order = probs.sort(dim=-1, descending=True, stable=True)
    before, best = ranked.cumsum(-1) - ranked, ranked[:, :1]
    inside, sure = torch.ones_like(ranked, dtype=torch.bool), torch.ones(len(probs), dtype=torch.bool)
    if rule.top_k:
        inside[:, rule.top_k :] = False
        sure &= ranked[:, rule.top_k - 1] - ranked[:, rule.top_k] > EDGE * ranked[:, rule.top_k]
    if rule.top_p < 1:
        inside &= before <= rule.top_p
        sure &= ((before - rule.top_p).abs() > EDGE).all(-1)
    if rule.min_p:
        inside &= ranked >= rule.min_p * best
        sure &= ((ranked - rule.min_p * best).abs() > EDGE * best).all(-1)
    probs = torch.zeros_like(probs).scatter_(1, order, ranked * inside)
    return probs / probs.sum(-1, keepdim=True), sure


class Target:
    """The target in Hugging Face transformers, float32, on one prompt at a time."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def logits(self, prompt: Sequence[int], tokens: torch.Tensor) -> torch.Tensor:
        """[n, L + 1, V]: what follows the prompt and each prefix of the rows of ``tokens`` [n, L]."""
        # Rows often begin alike; one of each kind is enough.
        text = torch.cat([torch.tensor([list(prompt)]).expand(len(tokens), -1), tokens], 1)
        text, where = text.unique(dim=0, return_inverse=True)
        keep = tokens.shape[1] + 1
        with torch.inference_mode():
            found = [self.model(part, logits_to_keep=keep).logits for part in text.split(256)]
        return torch.cat(found)[where]


@dataclass(frozen=True)
class Draws:
    """Tokens that were drawn under one rule, each after its own prefix.

    Attributes:
        rule: they are to be tested against.
        prefixes: one hashable per token; equal ones have equal logits.
        logits: float32 [n, V].
        tokens: int64 [n].
    """

    rule: Rule
    prefixes: list[Any]
    logits: torch.Tensor
    tokens: torch.Tensor

    def against(self, rule: Rule) -> Draws:
        return replace(self, rule=rule)


def p_value(statistic: float, freedom: float) -> float:
    """Of the chi-square distribution."""
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def impossible(parts: Iterable[Draws]) -> int:
    """Tokens that their distribution does not contain."""
    count = 0
    for part in parts:
        probs, sure = distribution(part.logits, part.rule)
        count += int((sure & (probs.gather(1, part.tokens[:, None])[:, 0] == 0)).sum())
    return count


def ranks_test(parts: Iterable[Draws], seed: int = 0) -> float:
    """p-value of all tokens together, whatever their prefixes.

    A token becomes the probability of all that are likelier, plus a uniform share of its own: uniform on
    (0, 1) if and only if tokens are drawn from their own distributions. Cut into equal bins.
    """
    draw = torch.Generator().manual_seed(seed)
    counts = torch.zeros(BINS, dtype=torch.float64)
    for part in parts:
        probs, sure = distribution(part.logits, part.rule)
        mine = probs.gather(1, part.tokens[:, None])
        likelier = (probs * (probs > mine)).sum(-1)
        share = torch.rand(len(mine), generator=draw, dtype=torch.float64)
        place = ((likelier + share * mine[:, 0]) * BINS).long().clamp(max=BINS - 1)
        counts += torch.bincount(place[sure], minlength=BINS)
    expected = counts.sum() / BINS
    assert expected >= EXPECTED
    return p_value(float(((counts - expected) ** 2 / expected).sum()), BINS - 1)


def prefix_test(parts: Iterable[Draws]) -> tuple[float, int]:
    """p-value of the counts of every token after every prefix that is common enough; degrees of freedom.

    Each prefix has its own cells: its likely tokens one each, the others together.
    """
    statistic, freedom = 0.0, 0
    for part in parts:
        rows: dict[Any, list[int]] = defaultdict(list)
        for row, prefix in enumerate(part.prefixes):
            rows[prefix].append(row)
        for where in rows.values():
            if len(where) < 2 * EXPECTED:
                continue
            probs, sure = distribution(part.logits[where[0]][None], part.rule)
            expected = probs[0] * len(where)
            if not bool(sure):
                continue
            counts = torch.bincount(part.tokens[where], minlength=len(expected)).double()
            own = expected >= EXPECTED
            cells = [*zip(counts[own].tolist(), expected[own].tolist(), strict=True)]
            rest = float(counts[~own].sum()), float(expected[~own].sum())
            if rest[1] >= EXPECTED or not cells:
                cells.append(rest)
            else:
                # Too few for a cell: with the rarest of the likely ones.
                cells.sort(key=lambda cell: -cell[1])
                cells[-1] = cells[-1][0] + rest[0], cells[-1][1] + rest[1]
            statistic += sum((seen - want) ** 2 / want for seen, want in cells)
            freedom += len(cells) - 1
    assert freedom >= 5, "hardly a prefix came up often enough"
    return p_value(statistic, freedom), freedom
