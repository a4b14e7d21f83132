"""Batched generation: several groups of sequences decoded together from one static cache.

A group is a range of cache slots whose sequences start together; groups are staggered, so
matrix products always see many rows while attention runs only over the keys a group has.
On two CPU cores' worth of a laptop this is several times faster than per-request generation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from sglang_dflash.train.target import DenseTarget


@dataclass
class Job:
    """One sequence to continue: ``prompt`` token ids; ``temperature`` 0 is greedy."""

    prompt: list[int]
    temperature: float = 0.0
    max_new: int = 200
    tag: object = None


@dataclass
class Done:
    """``tokens`` = prompt + response (stop token included); ``planes`` [tokens, planes, hidden]
    holds the features and last hidden states (zero for the last token: it was never fed)."""

    job: Job
    tokens: list[int]
    stopped: bool
    planes: torch.Tensor | None = None


@dataclass
class _Group:
    first: int
    past: int
    jobs: list[Job] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    alive: list[bool] = field(default_factory=list)


class Generator:
    """Decodes jobs with ``groups`` x ``width`` slots of at most ``max_len`` tokens.

    Planes are kept in ``planes_dtype``, as the feature cache stores them.
    """

    def __init__(
        self,
        target: DenseTarget,
        stop: set[int],
        *,
        groups: int = 4,
        width: int = 32,
        max_len: int = 384,
        features: tuple[int, ...] | None = None,
        seed: int = 0,
        planes_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.target, self.stop, self.max_len = target, stop, max_len
        self.features = features
        self.cache = target.new_cache(groups * width, max_len)
        self.groups = [_Group(g * width, (g + 1) * width) for g in range(groups)]
        self.planes = None
        if features is not None:
            shape = (groups * width, max_len, len(features) + 1, target.hidden)
            self.planes = torch.zeros(shape, dtype=planes_dtype, device=target.device)
        self.rng = torch.Generator(device=target.device).manual_seed(seed)

    def _pick(self, last: torch.Tensor, temperature: torch.Tensor) -> list[int]:
        """Next tokens of rows ``last`` [n, hidden]: greedy, or sampled from the whole vocabulary."""
        logits = F.linear(last, self.target.head)
        picked = logits.argmax(-1)  # of tied logits, common in bf16, the smallest id
        rows = temperature.nonzero()[:, 0]
        if len(rows):
            probs = (logits[rows].float() / temperature[rows, None]).softmax(-1)
            picked[rows] = torch.multinomial(probs, 1, generator=self.rng)[:, 0]
        return picked.tolist()

    def _start(self, group: _Group, jobs: list[Job]) -> None:
        longest = max(len(job.prompt) for job in jobs)
        tokens = torch.zeros(len(jobs), longest, dtype=torch.long, device=self.target.device)
        for row, job in enumerate(jobs):
            tokens[row, : len(job.prompt)] = torch.tensor(job.prompt)
        out = self.target.prefill(tokens, self.features or (), self.cache, group.first)
        if self.planes is not None:
            self.planes[group.first : group.first + len(jobs), :longest] = out
        ends = torch.tensor([len(job.prompt) - 1 for job in jobs])
        first = self._pick(out[torch.arange(len(jobs)), ends, -1], self._temperatures(jobs))
        group.jobs = jobs
        group.tokens = [[*job.prompt, token] for job, token in zip(jobs, first, strict=True)]
        group.alive = [True] * len(jobs)

    def _temperatures(self, jobs: list[Job]) -> torch.Tensor:
        return torch.tensor([job.temperature for job in jobs], device=self.target.device)

    def _collect(self, group: _Group) -> Iterator[Done]:
        """Sequences of ``group`` that just ended."""
        for row, (job, tokens) in enumerate(zip(group.jobs, group.tokens, strict=True)):
            if not group.alive[row]:
                continue
            stopped = tokens[-1] in self.stop
            full = len(tokens) - len(job.prompt) >= job.max_new or len(tokens) >= self.max_len
            if stopped or full:
                group.alive[row] = False
                planes = None
                if self.planes is not None:
                    planes = self.planes[group.first + row, : len(tokens)].clone()
                    planes[-1] = 0
                yield Done(job, tokens, stopped, planes)

    def run(self, source: Callable[[int], list[Job]]) -> Iterator[Done]:
        """Continue jobs until ``source(n)`` (at most n jobs of like length) is dry and all have ended."""
        dry = False
        while True:
            # One group is refilled per step, so that groups do not fall into lockstep.
            for group in self.groups:
                if not any(group.alive) and not dry:
                    jobs = source(group.past - group.first)
                    dry = not jobs
                    if jobs:
                        self._start(group, jobs)
                        yield from self._collect(group)
                    break
            active = [(group, row) for group in self.groups for row, alive in enumerate(group.alive) if alive]
            if not active:
                if dry:
                    return
                continue
            yield from self._step(active)

    def _step(self, active: list[tuple[_Group, int]]) -> Iterator[Done]:
        device = self.target.device
        last = torch.tensor([g.tokens[r][-1] for g, r in active], device=device)
        slots = torch.tensor([g.first + r for g, r in active], device=device)
        positions = torch.tensor([len(g.tokens[r]) - 1 for g, r in active], device=device)
        live = [g for g in self.groups if any(g.alive)]
        ranges = [
            (g.first, g.past, max(len(t) for t, a in zip(g.tokens, g.alive, strict=True) if a)) for g in live
        ]
        out = self.target.decode(last, slots, positions, self.cache, ranges, self.features or ())
        if self.planes is not None:
            self.planes[slots, positions] = out.to(self.planes.dtype)
        picked = self._pick(out[:, -1], self._temperatures([g.jobs[r] for g, r in active]))
        for (group, row), token in zip(active, picked, strict=True):
            group.tokens[row].append(token)
        for group in live:
            yield from self._collect(group)
