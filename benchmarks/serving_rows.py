"""The serving benchmark's measurements: what one is, which of them may be compared, and what they say."""

from __future__ import annotations

import hashlib
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from sglang_dflash.models.cache import make_dir

ROOT = Path(__file__).resolve().parents[1]
PLAIN, CHAIN, AUTO = "plain", "chain", "auto"


class Percentiles(BaseModel):
    """Milliseconds."""

    p50: float
    p90: float
    p99: float


class Measured(BaseModel):
    """What every benchmark's row has: where it belongs.

    Attributes:
        setup: digest of all that must be equal for two rows to be compared.
        run: when the command that measured it was started.
        round: rows of one round (and load) have the same prompts; paired only where ``run`` is the same too.
    """

    model_config = ConfigDict(extra="forbid")

    setup: str
    run: str
    round: int
    method: str


class Row(Measured):
    """A finished cell of the serving benchmark.

    Attributes:
        widths: share of the cell's decode steps by width, of ``auto`` only.
    """

    concurrency: int
    requests: int = 0
    tokens: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    accept_length: float | None = None
    ttft_ms: Percentiles | None = None
    itl_ms: Percentiles | None = None
    outputs: dict[str, str] = {}
    widths: dict[str, float] | None = None
    machine: str = ""
    threads: str = ""
    device: str | None = None
    sglang: str = ""


AnyRow = TypeVar("AnyRow", bound=Measured)


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the two nearest ranks, as numpy's default."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def percentiles(seconds: Sequence[float]) -> Percentiles | None:
    if not seconds:
        return None
    return Percentiles(**{f"p{p}": round(1000 * percentile(seconds, p / 100), 3) for p in (50, 90, 99)})


def machine() -> str:
    """CPU model and core count, and the GPU where there is one."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        name = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line),
            name,
        )
    import torch

    cores = torch.multiprocessing.cpu_count()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {cores} cores{gpu}"


def code() -> str:
    """Digest of the product's source: measurements of two versions are never mixed."""
    digest = hashlib.sha256()
    for folder in ("sglang_dflash", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def append(path: Path, row: Measured) -> None:
    make_dir(path.parent)
    with path.open("a") as file:
        file.write(row.model_dump_json(exclude_none=True) + "\n")


def read_rows(path: Path, kind: type[AnyRow], setup: str | None = None) -> list[AnyRow]:
    """Rows of one setup, by default the one measured last; a line cut off by a crash is left out."""
    rows: list[AnyRow] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(kind.model_validate_json(line))
        except ValidationError:
            continue
    if rows and setup is None:
        setup = rows[-1].setup
    return [row for row in rows if row.setup == setup]


# What rows say ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of some rounds."""

    median: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f}-{self.high:.2f})"


def spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    return Spread(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class Cell:
    """A method at a load, over its rounds. Tokens/s, accept length and latencies are medians.

    Attributes:
        vs_plain: ratio of tokens/s to plain decoding's in the same round.
        same: share of outputs that are plain decoding's in the same round, bit for bit.
        widths: mean share of steps by width, of ``auto`` only.
    """

    method: str
    concurrency: int
    rounds: int
    tokens_per_second: float
    vs_plain: Spread | None
    accept_length: float | None
    ttft_ms: float | None
    itl_ms: tuple[float, float] | None
    same: float | None
    widths: dict[str, float]


@dataclass(frozen=True)
class Verdict:
    """``auto`` against the best other method at a load: the one with the best median ratio to plain."""

    concurrency: int
    best: str
    ratio: Spread


class Results:
    """All rows of a setup, a method's last row of a round before earlier ones."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = {(row.concurrency, row.method, row.round): row for row in rows}
        self.rows = list(self._rows.values())
        self.levels = sorted({row.concurrency for row in self.rows})
        self.methods = sorted({row.method for row in self.rows}, key=method_order)

    def of(self, level: int, method: str) -> list[Row]:
        return [row for row in self.rows if row.concurrency == level and row.method == method]

    def pairs(self, level: int, method: str, other: str) -> list[tuple[Row, Row]]:
        """Rows of both methods with the same prompts, measured within minutes of each other."""
        found = ((row, self._rows.get((level, other, row.round))) for row in self.of(level, method))
        return [(row, mate) for row, mate in found if mate is not None and mate.run == row.run]

    def ratios(self, level: int, method: str, other: str) -> Spread | None:
        return spread(
            [a.tokens_per_second / b.tokens_per_second for a, b in self.pairs(level, method, other)]
        )

    def cell(self, level: int, method: str) -> Cell | None:
        rows = self.of(level, method)
        if not rows:
            return None
        lengths = [row.accept_length for row in rows if row.accept_length is not None]
        first = [row.ttft_ms.p50 for row in rows if row.ttft_ms is not None]
        gaps = [row.itl_ms for row in rows if row.itl_ms is not None]
        shares = [row.widths for row in rows if row.widths]
        return Cell(
            method,
            level,
            len(rows),
            statistics.median(row.tokens_per_second for row in rows),
            self.ratios(level, method, PLAIN),
            statistics.median(lengths) if lengths else None,
            statistics.median(first) if first else None,
            (statistics.median(g.p50 for g in gaps), statistics.median(g.p99 for g in gaps))
            if gaps
            else None,
            self._same(level, method),
            {w: sum(s.get(w, 0.0) for s in shares) / len(shares) for w in {w for s in shares for w in s}},
        )

    def _same(self, level: int, method: str) -> float | None:
        equal = [
            row.outputs[key] == plain.outputs[key]
            for row, plain in self.pairs(level, method, PLAIN)
            for key in row.outputs.keys() & plain.outputs.keys()
        ]
        return sum(equal) / len(equal) if equal else None

    def cells(self) -> list[Cell]:
        """By load, then by method."""
        found = (self.cell(level, method) for level in self.levels for method in self.methods)
        return [cell for cell in found if cell is not None]

    def verdicts(self) -> list[Verdict]:
        """Only of loads at which ``auto`` and others were measured."""
        found = []
        for level in self.levels:
            ratios = {m: self.ratios(level, m, PLAIN) for m in self.methods if m != AUTO}
            known = {m: ratio.median for m, ratio in ratios.items() if ratio is not None}
            if not known:
                continue
            best = max(known, key=lambda m: known[m])
            if ratio := self.ratios(level, AUTO, best):
                found.append(Verdict(level, best, ratio))
        return found


def method_order(method: str) -> tuple[int, int, str]:
    """plain, chain, fixed widths from narrow to wide, auto."""
    if method in (PLAIN, CHAIN):
        return (0, (PLAIN, CHAIN).index(method), method)
    if method == AUTO:
        return (2, 0, method)
    nodes = method.partition("x")[0]
    return (1, int(nodes) if nodes.isdecimal() else 0, method)
