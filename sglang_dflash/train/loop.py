"""What every training run does: a budget, a log, exact resume, the best drafter by held-out accept length."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch

from sglang_dflash.errors import UserError
from sglang_dflash.train import parallel
from sglang_dflash.train.batches import Document
from sglang_dflash.train.checkpoint import save_drafter
from sglang_dflash.train.corpus import write_atomically
from sglang_dflash.train.judge import Judgement, judge
from sglang_dflash.train.model import Drafter
from sglang_dflash.train.optim import MasterAdamW
from sglang_dflash.train.target import DenseTarget


class Budget(Protocol):
    """The settings that a loop reads: of ``minutes`` and ``steps`` exactly one is given."""

    minutes: float | None
    steps: int | None
    eval_every: float
    save_every: float


@dataclass
class Point:
    """One row of the log."""

    step: int
    seconds: float
    loss: float
    accept: float  # tokens a block at random anchors; of a selector the share whose first candidate is right
    rate: float
    norm: float
    right: list[float] = field(default_factory=list)  # top-1 right by drafted position
    held_out: dict[str, float] | None = None


class Loop:
    """Trains ``drafter`` in place; ``out`` receives ``best/`` (served), ``state.pt`` and ``log.jsonl``.

    A subclass sets ``optimizer`` and says what a step is.
    """

    optimizer: MasterAdamW
    budgets: tuple[int, ...] = (32,)  # trees judged beside the chain
    score = "all/chain"  # what makes a drafter the best so far

    def __init__(
        self,
        drafter: Drafter,
        target: DenseTarget,
        held_out: list[Document],
        settings: Any,
        out: Path,
        observe: Callable[[Point], None],
    ) -> None:
        if (settings.minutes is None) == (settings.steps is None):
            raise UserError("give exactly one budget: --minutes or --steps")
        drafter.to(target.device, target.dtype)
        self.drafter, self.target, self.held_out, self.s, self.out = drafter, target, held_out, settings, out
        self.observe = observe
        out.mkdir(parents=True, exist_ok=True)
        self.step, self.elapsed, self.best = 0, 0.0, 0.0
        self.log: list[Point] = []
        self._last = {"eval": 0.0, "save": 0.0}

    def train_step(self) -> Point:
        """One update."""
        raise NotImplementedError

    def progress(self) -> float:
        if self.s.steps is not None:
            return self.step / self.s.steps
        return self.elapsed / (60 * (self.s.minutes or 1))

    def _due(self, name: str, every: float) -> bool:
        now = self.step if self.s.steps is not None else self.elapsed
        if now - self._last[name] < every:
            return False
        self._last[name] = now
        return True

    def run(self) -> float:
        """Train to the end of the budget; returns the best held-out accept length."""
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
        point.held_out = lengths(self.judge())
        score = point.held_out[self.score]
        if score > self.best:
            self.best = score
            save_drafter(self.out / "best", self.drafter)

    def judge(self) -> dict[str, Judgement]:
        """The drafter as it is, on the held-out documents."""
        return judge(self.drafter, self.target, self.held_out, self.budgets)

    def check(self, loss: float, norm: float) -> None:
        """Stop where a step brought no number.

        Raises:
            UserError: ``loss`` or the gradient's ``norm`` is not finite.
        """
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise UserError(
                f"loss is {loss}, gradient norm {norm} at step {self.step}: stopped, last good checkpoint is "
                f"{self.out}; lower --rate (now {self.s.rate:g})"
            )

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


def lengths(found: dict[str, Judgement]) -> dict[str, float]:
    """Accept lengths by group and policy, e.g. ``all/tree-32``."""
    return {f"{name}/{policy}": walk.length for name, j in found.items() for policy, walk in j.walks.items()}


def _comparable(settings: Any) -> dict:
    """Settings as plain values, without the budget (a longer budget may continue a run)."""
    return _plain({k: v for k, v in asdict(settings).items() if k not in ("minutes", "save_every")})


def _plain(values: dict) -> dict:
    return json.loads(json.dumps(values))
