"""Sampled text from a live tree server follows the target's exact distribution, token by token."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dflash_kernels import race_argmax

from sglang_dflash.client.metrics import read_metrics
from tests.server.distribution import Draws, Rule, Target, distribution, impossible, prefix_test, ranks_test
from tests.server.support import Client, accept_length

# The requests count for the first test; on a third of a core they take 12 minutes.
pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(2400)]

RULES = (
    Rule(1.5),
    Rule(2.0),
    Rule(2.0, top_p=0.8),
    Rule(2.0, top_k=5),
    Rule(2.0, min_p=0.08),
    Rule(2.5, top_k=12, top_p=0.9, min_p=0.03),
)
#: The first token comes from the prefill, the others are those that a tree can emit at depths 1 to 4.
LENGTH = 5
EACH = 1700
#: Of one list to /generate; two lists are under way at a time.
BATCH = 300
#: There are 32 p-values below, so that a right sampler fails less than once in 30,000 runs.
ALARM = 1e-6
KINDS = ("unseeded", "foreseen")


@dataclass(frozen=True)
class Sample:
    """Continuations of one prompt under one rule.

    "unseeded" requests draft the most common tokens of each place. "foreseen" ones have seeds, and draft what
    the seed's noise will choose, so that every path is accepted to its end: the drafts know all they can.
    """

    rule: Rule
    prompt: tuple[int, ...]
    replies: list[dict[str, Any]]
    tokens: torch.Tensor
    logits: torch.Tensor

    def at(self, place: int) -> Draws:
        prefixes = [(self.prompt, *row) for row in self.tokens[:, :place].tolist()]
        return Draws(self.rule, prefixes, self.logits[:, place], self.tokens[:, place])


@dataclass(frozen=True)
class Run:
    samples: dict[str, list[Sample]]
    off_spine: float

    def at(self, kind: str, place: int) -> list[Draws]:
        return [sample.at(place) for sample in self.samples[kind]]


def continued(
    target: Target, prompt: tuple[int, ...], rows: int, choose: Callable[[torch.Tensor, int], torch.Tensor]
) -> torch.Tensor:
    """int64 [rows, LENGTH]; ``choose`` gets logits [rows, V] and how many tokens there are."""
    tokens = torch.empty(rows, 0, dtype=torch.int64)
    for place in range(LENGTH):
        chosen = choose(target.logits(prompt, tokens)[:, -1], place)
        tokens = torch.cat([tokens, chosen[:, None]], 1)
    return tokens


def common_tokens(target: Target, prompt: tuple[int, ...], rule: Rule) -> list[list[int]]:
    """The three most common tokens of each place."""
    generator = torch.Generator().manual_seed(5)

    def choose(logits: torch.Tensor, _: int) -> torch.Tensor:
        return torch.multinomial(distribution(logits, rule)[0], 1, generator=generator)[:, 0]

    columns = continued(target, prompt, 400, choose).T.tolist()
    return [[token for token, _ in Counter(column).most_common(3)] for column in columns]


def foreseen(target: Target, prompt: tuple[int, ...], rule: Rule, seeds: torch.Tensor) -> torch.Tensor:
    """What the noise of each seed chooses."""

    def choose(logits: torch.Tensor, place: int) -> torch.Tensor:
        position = torch.full_like(seeds, len(prompt) + place)
        return race_argmax(distribution(logits, rule)[0].float(), seeds, position)

    return continued(target, prompt, len(seeds), choose)


def post_in_lists(client: Client, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The replies in order."""

    def post(part: list[dict[str, Any]]) -> list[dict[str, Any]]:
        names = part[0].keys()
        reply = client.http.post("/generate", json={name: [body[name] for body in part] for name in names})
        reply.raise_for_status()
        return reply.json()

    parts = [bodies[start : start + BATCH] for start in range(0, len(bodies), BATCH)]
    with ThreadPoolExecutor(2) as pool:
        return [reply for replies in pool.map(post, parts) for reply in replies]


def bodies_of(target: Target, prompt: tuple[int, ...], rule: Rule, first_seed: int) -> dict[str, list[dict]]:
    common = {"max_new_tokens": LENGTH, "ignore_eos": True, **rule.params()}
    options = {"options": common_tokens(target, prompt, rule)}
    seeds = torch.arange(first_seed, first_seed + EACH)
    answers = foreseen(target, prompt, rule, seeds).tolist()
    params = {
        "unseeded": [{"custom_params": options}] * EACH,
        "foreseen": [
            {"sampling_seed": seed, "custom_params": {"answer": answer}}
            for seed, answer in zip(seeds.tolist(), answers, strict=True)
        ],
    }
    return {
        kind: [{"input_ids": list(prompt), "sampling_params": common | more} for more in params[kind]]
        for kind in KINDS
    }


@pytest.fixture(scope="module")
def run(tiny_tree: Client, tiny_pair: tuple[Path, Path]) -> Run:
    """All requests, in a mixed order, so that every batch holds all rules and both kinds."""
    target, draw = Target(tiny_pair[0]), random.Random(13)
    prompts = [tuple(draw.randrange(3, 250) for _ in range(8)) for _ in RULES]
    keyed = [
        (kind, i, body)
        for i, (prompt, rule) in enumerate(zip(prompts, RULES, strict=True))
        for kind, bodies in bodies_of(target, prompt, rule, 1 + i * EACH).items()
        for body in bodies
    ]
    draw.shuffle(keyed)

    def off_spine() -> float:
        return read_metrics(tiny_tree.server.url).total("sglang_dflash:off_spine_accepts_total")

    before = off_spine()
    replies = post_in_lists(tiny_tree, [body for _, _, body in keyed])
    moved = off_spine() - before
    samples: dict[str, list[Sample]] = {}
    for kind in KINDS:
        samples[kind] = []
        for i, (prompt, rule) in enumerate(zip(prompts, RULES, strict=True)):
            mine = [reply for key, reply in zip(keyed, replies, strict=True) if key[:2] == (kind, i)]
            tokens = torch.tensor([reply["output_ids"] for reply in mine])
            samples[kind].append(Sample(rule, prompt, mine, tokens, target.logits(prompt, tokens[:, :-1])))
    return Run(samples, moved)


def test_paths_off_the_spine_were_accepted(run: Run) -> None:
    """Else the tests below would test little more than plain decoding."""
    replies = {kind: [reply for sample in run.samples[kind] for reply in sample.replies] for kind in KINDS}
    assert sum(map(len, replies.values())) == 2 * len(RULES) * EACH >= 20_000
    lengths = {kind: accept_length(replies[kind]) for kind in KINDS}
    print(f"accept lengths {lengths}, off-spine steps {run.off_spine:.0f}")
    assert lengths["foreseen"] > 3.95
    assert lengths["unseeded"] > 1.2
    # Every foreseen path leaves the spine at depth 3.
    assert run.off_spine > 0.99 * len(replies["foreseen"]) + 0.2 * len(replies["unseeded"])


def test_no_filtered_token_is_emitted(run: Run) -> None:
    for kind in KINDS:
        assert sum(impossible(run.at(kind, place)) for place in range(LENGTH)) == 0


@pytest.mark.parametrize("place", range(LENGTH))
@pytest.mark.parametrize("kind", KINDS)
def test_each_depth_follows_the_target(kind: str, place: int, run: Run) -> None:
    parts = run.at(kind, place)
    together = ranks_test(parts)
    by_prefix, freedom = prefix_test(parts)
    print(f"{kind} token {place}: ranks p = {together:.3g}, prefixes p = {by_prefix:.3g} of {freedom}")
    assert together > ALARM
    assert by_prefix > ALARM


@pytest.mark.parametrize("index", range(len(RULES)), ids=lambda index: str(RULES[index].params()))
@pytest.mark.parametrize("kind", KINDS)
def test_each_filter_follows_the_target(kind: str, index: int, run: Run) -> None:
    sample = run.samples[kind][index]
    together = ranks_test(sample.at(place) for place in range(LENGTH))
    print(f"{kind} {sample.rule}: p = {together:.3g}")
    assert together > ALARM


class TestWrongSamplersAreFound:
    """The same statistics on the same replies, against what a wrong sampler would follow."""

    @pytest.mark.parametrize("place", range(LENGTH))
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_temperature_15_percent_too_high(self, kind: str, place: int, run: Run) -> None:
        parts = [part.against(part.rule.at(part.rule.temperature * 1.15)) for part in run.at(kind, place)]
        assert ranks_test(parts) < ALARM
        assert prefix_test(parts)[0] < ALARM

    @pytest.mark.parametrize("index", [i for i, rule in enumerate(RULES) if rule != rule.unfiltered()])
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_filter_left_out(self, kind: str, index: int, run: Run) -> None:
        sample = run.samples[kind][index]
        draws = [sample.at(place) for place in range(LENGTH)]
        assert ranks_test(part.against(sample.rule.unfiltered()) for part in draws) < ALARM

    @pytest.mark.parametrize("place", range(1, LENGTH))
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_draft_taken_unseen(self, kind: str, place: int, run: Run) -> None:
        """One token in eight is the target's likeliest instead of its sample."""
        parts = []
        for part in run.at(kind, place):
            tokens = part.tokens.clone()
            tokens[::8] = part.logits[::8].argmax(-1)
            parts.append(replace(part, tokens=tokens))
        assert ranks_test(parts) < ALARM

    @pytest.mark.parametrize("place", range(1, LENGTH))
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_parents_distribution(self, kind: str, place: int, run: Run) -> None:
        """A node that does not see its own token."""
        parts = [
            replace(part, logits=parent.logits)
            for part, parent in zip(run.at(kind, place), run.at(kind, place - 1), strict=True)
        ]
        assert prefix_test(parts)[0] < ALARM
