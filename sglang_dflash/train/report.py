"""What a person sees of a run: a progress bar, TensorBoard, and a PNG of loss and accept length."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_dflash.train.loop import Budget, Point

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger("sglang_dflash.train")
ACCEPT = "accept"


class View:
    """Shows points as they come; without a terminal, one line every half minute."""

    def __init__(self, out: Path, settings: Budget) -> None:
        self.settings, self.last, self.smooth = settings, 0.0, [0.0, 0.0]
        self.bar: Progress | None = None
        self.board: SummaryWriter | None = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out / "tensorboard"))
        except ImportError:
            logger.info(
                "no tensorboard installed (pip install sglang-dflash[train]): log.jsonl and the PNG only"
            )

    def __enter__(self) -> View:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("train"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task("train", total=1.0, text="")
            self.bar.start()
        return self

    def __exit__(self, *exc) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.board is not None:
            self.board.close()

    def _done(self, p: Point) -> float:
        if self.settings.steps is not None:
            return p.step / self.settings.steps
        return p.seconds / (60 * (self.settings.minutes or 1))

    def observe(self, p: Point) -> None:
        keep = 0.95 if self.smooth[0] else 0.0
        self.smooth = [
            keep * a + (1 - keep) * b for a, b in zip(self.smooth, (p.loss, p.accept), strict=True)
        ]
        loss, accept = self.smooth
        text = (
            f"step {p.step} loss {loss:.3f} {_name(accept)} {accept:.2f} rate {p.rate:.1e} norm {p.norm:.2f}"
        )
        if self.board is not None:
            self.board.add_scalar("train/loss", p.loss, p.step)
            self.board.add_scalar(
                f"train/{_name(p.accept).replace(' ', '_')}_random_anchors", p.accept, p.step
            )
            self.board.add_scalar("train/rate", p.rate, p.step)
            for name, value in (p.held_out or {}).items():
                self.board.add_scalar(f"held_out/{name}", value, p.step)
        if self.bar is not None:
            self.bar.update(self.task, completed=self._done(p), text=text)
        now = time.monotonic()
        if p.held_out:
            found = ", ".join(f"{k} {v:.2f}" for k, v in p.held_out.items())
            logger.info("step %d (%.1f min): held-out accept length %s", p.step, p.seconds / 60, found)
        elif self.bar is None and now - self.last > 30:
            self.last = now
            logger.info("%.0f%% %s", 100 * self._done(p), text)


def _name(accept: float) -> str:
    """What a point's ``accept`` is: no block brings less than one token, no share is above one."""
    return ACCEPT if accept >= 1 else "right first"


def plot(out: Path) -> Path:
    """``curve.png`` of the run in ``out``: loss, training and held-out accept length over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    minutes = [r["seconds"] / 60 for r in rows]
    window = max(1, len(rows) // 100)

    def smooth(values: list[float]) -> list[float]:
        parts = [values[max(0, i - window) : i + 1] for i in range(len(values))]
        return [sum(part) / len(part) for part in parts]

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    axes[0].plot(minutes, smooth([r["loss"] for r in rows]))
    axes[0].set(xlabel="minutes", ylabel="loss")
    accept = [r["accept"] for r in rows]
    if _name(accept[0]) == ACCEPT:
        axes[1].plot(minutes, smooth(accept), alpha=0.4, label="training, random anchors")
    judged = [r for r in rows if r.get("held_out")]
    for policy in ("all/chain", "all/tree-32"):
        axes[1].plot(
            [r["seconds"] / 60 for r in judged], [r["held_out"][policy] for r in judged], "o-", ms=3,
            label=f"held out, {policy.split('/')[1]}",
        )  # fmt: skip
    axes[1].set(xlabel="minutes", ylabel="accept length")
    axes[1].legend()
    figure.tight_layout()
    path = out / "curve.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
