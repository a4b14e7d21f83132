"""DFlash 2's selector for a drafter that has none: tables trained over the frozen drafter.

The drafter's positions know nothing of each other; the selector adds to each candidate's score what its
predecessor says of it: ``<A[before] * P h, B[candidate]>`` (SGLang's ``CandidateSelector``).
Its tables are linear maps of the target's embedding and head, ``A = E V`` and ``B = W U``, so that what is
learned of one token holds for those like it: free tables of 49,152 tokens know an answer by heart after two
passes. V, U and P are trained; what is written out are the tables that SGLang loads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from sglang_dflash.errors import UserError
from sglang_dflash.train.batches import Document, Sampler, build_batch, last_hidden
from sglang_dflash.train.judge import TOP, Judgement, draft_table, judge_tables, with_edges
from sglang_dflash.train.loop import Loop, Point, lengths
from sglang_dflash.train.model import CandidateSelector, Drafter
from sglang_dflash.train.optim import MasterAdamW, learning_rate
from sglang_dflash.train.target import DenseTarget

logger = logging.getLogger("sglang_dflash.train")
#: Weights of the edge that a judgement tries: trained ones may be surer than they are right.
STRENGTHS = (0.5, 0.7, 0.85, 1.0, 1.2)


@dataclass
class SelectorSettings:
    """One run. Either ``minutes`` or ``steps`` is the budget; ``steps`` makes a run repeatable."""

    rank: int = 64
    minutes: float | None = None
    steps: int | None = None
    rate: float = 3e-3
    warmup: float = 0.04
    weight_decay: float = 0.01
    clip: float = 1.0
    rows: int = 8  # documents the drafter reads at once
    anchors: int = 32  # of a document; all their positions are kept in memory
    batch: int = 4096  # positions an update
    gamma: float = 4.0
    kl: float = 0.5
    seed: int = 0
    eval_every: float = 60.0  # seconds (minutes budget) or steps (steps budget)
    save_every: float = 60.0  # the same unit
    how: str = "split"


@dataclass
class Places:
    """Positions of answers as the frozen drafter sees them, those that a tree can reach and get right.

    before: int64 [n] the right token before; ids: int64 [n, K] candidates; logprobs: fp32 [n, K]
    hidden: [n, H] the drafter's state; right: int64 [n] which candidate is the right token
    wanted: fp32 [n, K] the target's own probabilities, of the candidates alone; depth: int64 [n]
    """

    before: torch.Tensor
    ids: torch.Tensor
    logprobs: torch.Tensor
    hidden: torch.Tensor
    right: torch.Tensor
    wanted: torch.Tensor
    depth: torch.Tensor

    def __len__(self) -> int:
        return len(self.before)

    def __getitem__(self, index: torch.Tensor) -> Places:
        return Places(*(getattr(self, f.name)[index] for f in fields(self)))


@torch.no_grad()
def collect(drafter: Drafter, target: DenseTarget, sampler: Sampler, how: str = "split") -> Places:
    """What a frozen drafter drafts at the sampler's anchors of its first epoch."""
    c, parts = drafter.config, []
    for step in range(sampler.per_epoch):
        documents, anchors, _ = sampler.draw(step)
        batch = build_batch(documents, anchors, c.block, c.mask_token, 1.0, how=how)
        last = last_hidden(batch, documents).to(target.device, target.dtype)
        batch = batch.to(target.device)
        features = batch.planes[:, :, :-1].to(target.dtype)
        hidden = drafter(F.embedding(batch.inputs, target.embed), features, batch.layout)[:, :, 1:]
        labels = batch.labels.flatten(0, 1)
        before = torch.cat([batch.inputs[..., :1], batch.labels[..., :-1]], -1).flatten(0, 1)
        # Of rows that do not lie behind each other, a CPU's bfloat16 product takes 300 times as long.
        hidden, last = hidden.flatten(0, 1).contiguous(), last.flatten(0, 1)
        z = F.linear(hidden, target.head).float()
        values, ids = z.topk(TOP, dim=-1)
        logprobs = values - z.logsumexp(-1, keepdim=True)
        hit = ids == labels[..., None]
        reached = hit.any(-1).long().cumprod(1).bool()
        depth = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
        said = torch.einsum("nh,nkh->nk", last[reached].float(), target.head[ids[reached]].float())
        parts.append(
            (
                before[reached],
                ids[reached],
                logprobs[reached],
                hidden[reached],
                hit[reached].long().argmax(-1),
                said.softmax(-1),
                depth[reached],
            )
        )
        if step % 50 == 49:
            logger.info("drafted %d of %d documents", (step + 1) * sampler.rows, len(sampler.documents))
    return Places(*(torch.cat(column) for column in zip(*parts, strict=True)))


class Tables(nn.Module):
    """What is trained: V, U [H, rank] and P [rank, H]; P starts at zero, where a selector says nothing."""

    def __init__(self, target: DenseTarget, rank: int) -> None:
        super().__init__()
        self.embed, self.head = target.embed, target.head
        hidden = self.embed.shape[1]
        self.of_before = nn.Parameter(_unit_map(self.embed, rank))
        self.of_after = nn.Parameter(_unit_map(self.head, rank))
        self.of_state = nn.Parameter(torch.zeros(rank, hidden, device=self.embed.device))

    def forward(self, places: Places) -> torch.Tensor:
        """fp32 [n, K] added to the candidates' log-probabilities."""
        before = self.embed[places.before].float() @ self.of_before
        known, where = places.ids.unique(return_inverse=True)
        after = (self.head[known].float() @ self.of_after)[where]
        state = F.linear(places.hidden.float(), self.of_state)
        return torch.einsum("nr,nkr->nk", before * state, after)

    @torch.no_grad()
    def write(self, module: CandidateSelector, strength: float = 1.0) -> None:
        """Write them out as tables of all tokens."""
        module.predecessor_codebook.copy_(self.embed.float() @ self.of_before)
        module.successor_codebook.copy_(self.head.float() @ self.of_after)
        module.hidden_projection.weight.copy_(self.of_state * strength)


def _unit_map(rows: torch.Tensor, rank: int) -> torch.Tensor:
    """A random [H, rank] that gives the images of ``rows`` [vocab, H] a spread of one."""
    start = torch.randn(rows.shape[1], rank, device=rows.device)
    return start / (rows.float() @ start).std()


class SelectorTrainer(Loop):
    """Trains the selector of a ``drafter`` whose other parts stay as they are."""

    budgets = (8, 32)
    score = "all/tree-8"

    def __init__(
        self,
        drafter: Drafter,
        target: DenseTarget,
        train: list[Document],
        held_out: list[Document],
        settings: SelectorSettings,
        out: Path,
        observe: Callable[[Point], None] = lambda point: None,
    ) -> None:
        super().__init__(drafter, target, held_out, settings, out, observe)
        drafter.eval()
        torch.manual_seed(settings.seed)
        self.tables = Tables(target, settings.rank)
        self.optimizer = MasterAdamW(
            self.tables, weight_decay=settings.weight_decay, clip=settings.clip, betas=(0.9, 0.99)
        )
        sampler = Sampler(train, settings.rows, settings.anchors, settings.seed)
        self.places = collect(drafter, target, sampler, settings.how)
        logger.info("%d positions that a tree can reach", len(self.places))
        if not len(self.places):
            raise UserError("the drafter has the right token among its candidates nowhere: nothing to learn")
        self._order: tuple[int, torch.Tensor] | None = None
        # What a frozen drafter drafts on held-out answers is computed once.
        self._held = [draft_table(drafter, target, document, keep_hidden=True) for document in held_out]
        self.strength = 1.0
        if held_out:
            alone = lengths(judge_tables([replace(t, edges=None) for t in self._held], self.budgets))
            self.best = alone[self.score]
            logger.info("without a selector: %s", ", ".join(f"{k} {v:.3f}" for k, v in alone.items()))

    def _batch(self) -> Places:
        """The step's positions, every one once an epoch."""
        size = min(self.s.batch, len(self.places))
        epoch, at = divmod(self.step, len(self.places) // size)
        if self._order is None or self._order[0] != epoch:
            rng = torch.Generator().manual_seed(self.s.seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(len(self.places), generator=rng))
        return self.places[self._order[1][at * size : (at + 1) * size].to(self.places.before.device)]

    def train_step(self) -> Point:
        places = self._batch()
        logits = places.logprobs + self.tables(places)
        said = logits.log_softmax(-1)
        label = -said.gather(1, places.right[:, None])[:, 0]
        # The target's own word, of the candidates alone: what else it might say is nobody's to rank.
        own = -(places.wanted * said).sum(-1)
        weight = torch.exp(-places.depth.float() / self.s.gamma)
        loss = ((1 - self.s.kl) * label + self.s.kl * own).mul(weight).sum() / weight.sum()
        loss.backward()
        rate = learning_rate(self.s.rate, self.progress(), self.s.warmup)
        norm = self.optimizer.step(rate)
        first = (logits.argmax(-1) == places.right).float()
        right = [float(first[places.depth == d].mean()) for d in range(self.drafter.config.block - 1)]
        value = float(loss.detach())
        self.check(value, norm)
        return Point(self.step, self.elapsed, value, float(first.mean()), rate, norm, right)

    @torch.no_grad()
    def judge(self) -> dict[str, Judgement]:
        """Held-out answers, at the edges' strength that does best on them, which the drafter keeps."""
        module = self.drafter.candidate_selector
        assert module is not None
        tried: list[tuple[float, float, dict[str, Judgement]]] = []
        for strength in STRENGTHS:
            self.tables.write(module, strength)
            found = judge_tables([with_edges(t, module) for t in self._held], self.budgets)
            tried.append((lengths(found)[self.score], strength, found))
        _, strength, found = max(tried, key=lambda row: row[0])
        self.tables.write(module, strength)
        self.strength = strength
        return found
