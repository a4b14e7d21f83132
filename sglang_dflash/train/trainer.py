"""The training loop: exact resume, a time or step budget, checkpoints by held-out accept length."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch.nn import functional as F

from sglang_dflash.errors import UserError
from sglang_dflash.train import parallel
from sglang_dflash.train.batches import Document, Sampler, build_batch, last_hidden
from sglang_dflash.train.checkpoint import save_drafter
from sglang_dflash.train.corpus import write_atomically
from sglang_dflash.train.judge import judge
from sglang_dflash.train.loss import Head, LossReport, LossSettings, block_loss, restricted_head
from sglang_dflash.train.model import Drafter
from sglang_dflash.train.optim import MasterAdamW, MasterMuon, learning_rate
from sglang_dflash.train.target import DenseTarget

logger = logging.getLogger(__name__)


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


@dataclass
class Point:
    """One row of the log."""

    step: int
    seconds: float
    loss: float
    accept: float
    rate: float
    norm: float
    right: list[float] = field(default_factory=list)  # top-1 right by drafted position
    held_out: dict[str, float] | None = None


class Trainer:
    """Trains ``drafter`` in place; ``out`` receives ``best/`` (served), ``state.pt`` and ``log.jsonl``."""

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
        if (settings.minutes is None) == (settings.steps is None):
            raise UserError("give exactly one budget: --minutes or --steps")
        drafter.to(target.device, target.dtype)
        self.drafter, self.target, self.held_out, self.s, self.out = drafter, target, held_out, settings, out
        self.observe = observe
        out.mkdir(parents=True, exist_ok=True)
        rank, world = parallel.start()
        self.sampler = Sampler(
            train[rank::world], settings.rows, settings.anchors, settings.seed, settings.pack_to
        )
        kind = MasterMuon if settings.optimizer == "muon" else MasterAdamW
        self.optimizer = kind(drafter, weight_decay=settings.weight_decay, clip=settings.clip)
        for layer in drafter.layers:
            layer.dropout = settings.dropout
        self.step, self.elapsed, self.best = 0, 0.0, 0.0
        self.log: list[Point] = []
        self.used = torch.unique(torch.cat([d.tokens for d in train]))
        self._head: tuple[int, Head] | None = None
        self._last = {"eval": 0.0, "save": 0.0}

    def progress(self) -> float:
        if self.s.steps is not None:
            return self.step / self.s.steps
        return self.elapsed / (60 * (self.s.minutes or 1))

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
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise UserError(
                f"loss is {loss}, gradient norm {norm} at step {self.step}: stopped, last good checkpoint is "
                f"{self.out}; lower --rate (now {self.s.rate:g})"
            )
        accept = sum(r.accept for r in reports) / len(reports)
        right = [round(x, 4) for x in reports[-1].right]
        return Point(self.step, self.elapsed, loss, accept, rate, norm, right)

    def _due(self, name: str, every: float) -> bool:
        now = self.step if self.s.steps is not None else self.elapsed
        if now - self._last[name] < every:
            return False
        self._last[name] = now
        return True

    def run(self) -> float:
        """Train to the end of the budget; returns the best held-out chain accept length."""
        self.drafter.train()
        clock = time.monotonic()
        while self.progress() < 1:
            point = self.train_step()
            self.step += 1
            now = time.monotonic()
            self.elapsed = parallel.agree(self.elapsed + now - clock)
            clock = now
            if self._due("eval", self.s.eval_every) and self.progress() < 1:
                self.evaluate(point)
            if self._due("save", self.s.save_every):
                self.save_state()
            self._record(point)
        final = Point(self.step, self.elapsed, self.log[-1].loss, self.log[-1].accept, 0.0, 0.0)
        self.evaluate(final)
        self._record(final)
        self.save_state()
        return self.best

    def evaluate(self, point: Point) -> None:
        """Judge on held-out documents; keep the drafter as ``best`` if its accept length rose."""
        if not self.held_out or not parallel.is_main():
            return
        found = judge(self.drafter, self.target, self.held_out, budgets=(32,))
        point.held_out = {
            f"{name}/{policy}": walk.length for name, j in found.items() for policy, walk in j.walks.items()
        }
        score = point.held_out["all/chain"]
        if score > self.best:
            self.best = score
            save_drafter(self.out / "best", self.drafter)

    def _record(self, point: Point) -> None:
        self.log.append(point)
        if not parallel.is_main():
            return
        with (self.out / "log.jsonl").open("a") as handle:
            handle.write(json.dumps(asdict(point)) + "\n")
        self.observe(point)

    def save_state(self) -> None:
        """Everything a resumed run needs for the same loss curve, in one atomically replaced file."""
        if not parallel.is_main():
            return
        state = {
            "optimizer": self.optimizer.state(),
            "step": self.step,
            "elapsed": self.elapsed,
            "best": self.best,
            "last": self._last,
            "settings": _comparable(self.s),
            "drafter": _plain(asdict(self.drafter.config)),
        }
        write_atomically(self.out / "state.pt", lambda p: torch.save(state, p))

    def resume(self) -> bool:
        """Continue from ``state.pt`` if there is one; the settings must be those it was started with."""
        file = self.out / "state.pt"
        if not file.is_file():
            return False
        try:
            state = torch.load(file, map_location=self.target.device, weights_only=True)
        except Exception as error:
            raise UserError(f"cannot read {file}: {error}; delete it to start afresh") from None
        mine = _comparable(self.s)
        changed = [k for k in mine if state["settings"].get(k) != mine[k]]
        drafter = _plain(asdict(self.drafter.config))
        changed += [
            f"the drafter's {k} {was}, now {drafter[k]}"
            for k, was in state.get("drafter", {}).items()
            if was != drafter.get(k)
        ]
        if changed:
            raise UserError(f"{file} was made with other settings ({', '.join(changed)}): give another --out")
        self.optimizer.load(state["optimizer"])
        self.step, self.elapsed, self.best = state["step"], state["elapsed"], state["best"]
        self._last = dict(state["last"])
        self._trim_log()
        return True

    def _trim_log(self) -> None:
        """Drop log rows after the restored step: they will be written again."""
        file = self.out / "log.jsonl"
        if not file.is_file():
            return
        rows = []
        for line in file.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the kill cut the last line
            if row["step"] < self.step:
                rows.append(row)
        names = {f.name for f in fields(Point)}
        self.log = [Point(**{k: v for k, v in row.items() if k in names}) for row in rows]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _comparable(settings: TrainSettings) -> dict:
    """Settings as plain values, without the budget (a longer budget may continue a run)."""
    return _plain({k: v for k, v in asdict(settings).items() if k not in ("minutes", "save_every")})


def _plain(values: dict) -> dict:
    return json.loads(json.dumps(values))
