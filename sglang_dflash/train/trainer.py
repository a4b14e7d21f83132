"""Training a drafter: what a step of the loop is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn import functional as F

from sglang_dflash.train import parallel
from sglang_dflash.train.batches import Document, Sampler, build_batch, last_hidden
from sglang_dflash.train.loop import Loop, Point
from sglang_dflash.train.loss import Head, LossReport, LossSettings, block_loss, restricted_head
from sglang_dflash.train.model import Drafter
from sglang_dflash.train.optim import MasterAdamW, MasterMuon, learning_rate
from sglang_dflash.train.target import DenseTarget


@dataclass
class TrainSettings:
    """One run. Either ``minutes`` or ``steps`` is the budget; ``steps`` makes a run repeatable."""

    minutes: float | None = None
    steps: int | None = None
    optimizer: str = "adamw"
    rate: float = 6e-4
    warmup: float = 0.04
    floor: float = 0.0
    rows: int = 16  # of documents (or packs of them) a micro-batch
    anchors: int = 16  # anchors a document
    pack_to: int = 0  # tokens a row; 0: one document a row
    accumulate: int = 1
    weight_decay: float = 0.01
    clip: float = 1.0
    loss: LossSettings = field(default_factory=LossSettings)
    negatives: int = -1  # -1: full head; n >= 0: corpus ids plus n random others a refresh
    refresh: int = 50  # steps between new random head rows
    dropout: float = 0.0  # of the layers' residual branches
    feature_noise: float = 0.0  # relative Gaussian noise on features, against learning documents by heart
    complementary: float = 0.0  # share of steps with twin blocks, part of the tokens revealed
    schedule: tuple[tuple[float, int], ...] = ()  # (progress from which, block size); (): the drafter's own
    seed: int = 0
    eval_every: float = 300.0  # seconds (minutes budget) or steps (steps budget)
    save_every: float = 120.0  # the same unit
    how: str = "split"


class Trainer(Loop):
    """Trains all of ``drafter`` (:class:`~sglang_dflash.train.loop.Loop`) on random blocks of the answers."""

    def __init__(
        self,
        drafter: Drafter,
        target: DenseTarget,
        train: list[Document],
        held_out: list[Document],
        settings: TrainSettings,
        out: Path,
        observe: Callable[[Point], None] = lambda point: None,
    ) -> None:
        super().__init__(drafter, target, held_out, settings, out, observe)
        rank, world = parallel.start()
        self.sampler = Sampler(
            train[rank::world], settings.rows, settings.anchors, settings.seed, settings.pack_to
        )
        kind = MasterMuon if settings.optimizer == "muon" else MasterAdamW
        self.optimizer = kind(drafter, weight_decay=settings.weight_decay, clip=settings.clip)
        for layer in drafter.layers:
            layer.dropout = settings.dropout
        drafter.train()
        self.used = torch.unique(torch.cat([d.tokens for d in train]))
        self._head: tuple[int, Head] | None = None

    def block(self) -> int:
        size = self.drafter.config.block
        for start, value in self.s.schedule:
            if self.progress() >= start:
                size = value
        return size

    def head(self) -> Head:
        """The full head, or the corpus's ids with fresh random competitors every ``refresh`` steps."""
        if self.s.negatives < 0:
            return Head(self.target.head)
        turn = self.step // self.s.refresh
        if self._head is None or self._head[0] != turn:
            rng = torch.Generator().manual_seed(self.s.seed * 999_983 + turn)
            self._head = (turn, restricted_head(self.target.head, self.used, self.s.negatives, rng))
        return self._head[1]

    def _micro(self, number: int, head: Head) -> LossReport:
        """Forward and backward of one micro-batch; gradients add up in the parameters."""
        documents, anchors, rng = self.sampler.draw(number)
        torch.manual_seed(self.s.seed * 1_000_003 + number)  # dropout repeats after a resume
        size, c = self.block(), self.drafter.config
        reveals: list[torch.Tensor | None] = [None]
        if self.s.complementary and float(torch.rand((), generator=rng)) < self.s.complementary:
            shape = (len(documents), max(map(len, anchors)), size - 1)
            shown = torch.rand(shape, generator=rng) < torch.rand((*shape[:2], 1), generator=rng)
            reveals = [shown, ~shown]
        report = LossReport()
        for reveal in reveals:
            batch = build_batch(documents, anchors, size, c.mask_token, self.s.loss.gamma, reveal, self.s.how)
            wanted = None
            if self.s.loss.kl:
                wanted = last_hidden(batch, documents).flatten(0, 1).to(self.target.device, self.target.dtype)
            batch = batch.to(self.target.device)
            features = batch.planes[:, :, :-1].to(self.target.dtype)
            if self.s.feature_noise:
                noise = torch.randn(features.shape, generator=rng, dtype=features.dtype)
                features = features * (1 + self.s.feature_noise * noise.to(features.device))
            embeddings = F.embedding(batch.inputs, self.target.embed)
            hidden = self.drafter(embeddings, features, batch.layout)
            loss, report = block_loss(
                hidden[:, :, 1:].flatten(0, 1), batch.labels.flatten(0, 1), batch.weight.flatten(0, 1),
                head, self.s.loss, wanted,
            )  # fmt: skip
            (loss / (self.s.accumulate * len(reveals))).backward()
        return report

    def train_step(self) -> Point:
        head = self.head()
        reports = [self._micro(self.step * self.s.accumulate + i, head) for i in range(self.s.accumulate)]
        parallel.average_gradients(self.optimizer.params)
        rate = learning_rate(self.s.rate, self.progress(), self.s.warmup, self.s.floor)
        norm = self.optimizer.step(rate)
        loss = sum(r.loss for r in reports) / len(reports)
        self.check(loss, norm)
        accept = sum(r.accept for r in reports) / len(reports)
        right = [round(x, 4) for x in reports[-1].right]
        return Point(self.step, self.elapsed, loss, accept, rate, norm, right)
