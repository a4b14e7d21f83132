"""A load that changes: code, then chat, then many at once, then one. Does ``auto`` keep up?

    python benchmarks/changing_load.py --minutes 45      # or: make bench-load

Every method in turn serves the same phases, --seconds each; what is in flight at the end of a phase is
aborted, and the next begins at once. Tokens count in the second in which they arrive. The oracle knows the
phase: it is the best of the other methods in each. Rows go to out/changing_load.jsonl, resumable; the picture
is out/changing_load.png. docs/benchmarks.md says more.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import command
import httpx
from fleet import METHODS, Fleet
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from serving_plot import colours, style
from serving_rows import AUTO, PLAIN, Measured, Spread, append, method_order, read_rows, spread

from sglang_dflash.cli import target
from sglang_dflash.client.chat import Prompt, read_prompts
from sglang_dflash.errors import UserError
from sglang_dflash.models.prompts import prompts_file

SMOOTH_SECONDS = 4


@dataclass(frozen=True)
class Phase:
    """``kinds`` of prompts, so many in flight."""

    name: str
    kinds: tuple[str, ...]
    in_flight: int


PHASES = (
    Phase("code, 4 in flight", ("code",), 4),
    Phase("chat, 4 in flight", ("chat",), 4),
    Phase("both, 32 in flight", ("chat", "code"), 32),
    Phase("both, 1 in flight", ("chat", "code"), 1),
)


class LoadRow(Measured):
    """One method's turn: of every phase, the tokens that arrived in each of its seconds."""

    tokens: list[list[int]]
    machine: str


@dataclass(frozen=True)
class Arrival:
    """``count`` tokens, ``at`` seconds after the phase began."""

    at: float
    count: int


def by_second(arrivals: Sequence[Arrival], seconds: int) -> list[int]:
    """Tokens of each second; what came after the phase's end is left out."""
    bins = [0] * seconds
    for arrival in arrivals:
        if arrival.at < seconds:
            bins[int(arrival.at)] += arrival.count
    return bins


class Feed:
    """A phase's prompts, one after the other, for many threads."""

    def __init__(self, prompts: Sequence[Prompt], phase: Phase, number: int) -> None:
        mine = [prompt for prompt in prompts if prompt.kind in phase.kinds]
        if not mine:
            raise UserError(f"no prompts of the kinds {', '.join(phase.kinds)}")
        self._prompts = random.Random(f"{phase.name} {number}").sample(mine, len(mine))
        self._at = 0
        self._lock = threading.Lock()

    def next(self) -> Prompt:
        with self._lock:
            self._at += 1
            return self._prompts[(self._at - 1) % len(self._prompts)]


def stream(http: httpx.Client, prompt: Prompt, max_tokens: int) -> Iterator[int]:
    """New tokens of every chunk of one greedy reply, until it ends or is aborted."""
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": prompt.prompt}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    had = 0
    with http.stream("POST", "/v1/chat/completions", json=body) as reply:
        reply.raise_for_status()
        for line in reply.iter_lines():
            data = line.removeprefix("data: ")
            if not line.startswith("data: ") or data == "[DONE]":
                continue
            usage = json.loads(data).get("usage") or {}
            have = int(usage.get("completion_tokens") or 0)
            if have > had:
                yield have - had
                had = have


def serve_phase(url: str, phase: Phase, feed: Feed, seconds: int, max_tokens: int) -> list[int]:
    """Keep the phase's requests in flight for so long; the tokens of each second."""
    arrivals: list[Arrival] = []
    limits = httpx.Limits(max_connections=2 * phase.in_flight)
    with httpx.Client(base_url=url, timeout=600.0, trust_env=False, limits=limits) as http:
        begin = time.monotonic()

        def work() -> None:
            while time.monotonic() - begin < seconds:
                for count in stream(http, feed.next(), max_tokens):
                    arrivals.append(Arrival(time.monotonic() - begin, count))

        with ThreadPoolExecutor(phase.in_flight) as pool:
            running = [pool.submit(work) for _ in range(phase.in_flight)]
            time.sleep(max(0.0, begin + seconds - time.monotonic()))
            while not all(future.done() for future in running):
                # A request that was on its way to the scheduler is not known there yet: ask again.
                http.post("/abort_request", json={"abort_all": True}).raise_for_status()
                time.sleep(0.1)
            for future in running:
                future.result()
    return by_second(arrivals, seconds)


# What rows say ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """``auto`` over the best other method of a phase, or over all phases with the best of each."""

    phase: str
    best: str
    ratio: Spread


class Results:
    """All rows of a setup, a method's last row of a round before earlier ones."""

    def __init__(self, rows: Sequence[LoadRow]) -> None:
        self._rows = {(row.method, row.round): row for row in rows}
        self.rows = list(self._rows.values())
        self.methods = sorted({row.method for row in self.rows}, key=method_order)
        self.seconds = len(self.rows[0].tokens[0])
        # Only rounds in which every method had its turn, in one run: an oracle needs all of them.
        self.rounds = [n for n in sorted({row.round for row in self.rows}) if self._whole(n)]

    def _whole(self, number: int) -> bool:
        runs = {row.run if (row := self._rows.get((m, number))) else None for m in self.methods}
        return len(runs) == 1 and None not in runs

    def tokens(self, method: str, phase: int) -> list[int]:
        """Of each whole round."""
        return [sum(self._rows[method, n].tokens[phase]) for n in self.rounds]

    def rate(self, method: str, phase: int) -> float:
        """Tokens/s, median."""
        return statistics.median(self.tokens(method, phase)) / self.seconds

    def best(self, phase: int) -> str:
        """The best of the others by tokens."""
        return max((m for m in self.methods if m != AUTO), key=lambda m: self.rate(m, phase))

    def best_fixed(self) -> str | None:
        """The fixed width with the most tokens over all phases."""
        fixed = [m for m in self.methods if method_order(m)[0] == 1]
        phases = range(len(PHASES))
        return max(fixed, key=lambda m: sum(self.rate(m, p) for p in phases)) if fixed else None

    def verdicts(self) -> list[Verdict]:
        """A phase each, and the whole."""
        if AUTO not in self.methods or len(self.methods) < 2 or not self.rounds:
            return []
        bests = [self.best(phase) for phase in range(len(PHASES))]
        mine = [self.tokens(AUTO, phase) for phase in range(len(PHASES))]
        theirs = [self.tokens(best, phase) for phase, best in enumerate(bests)]
        found = []
        for phase, best in enumerate(bests):
            ratio = spread([a / b for a, b in zip(mine[phase], theirs[phase], strict=True)])
            assert ratio is not None
            found.append(Verdict(PHASES[phase].name, best, ratio))
        sums = ([sum(column) for column in zip(*rows, strict=True)] for rows in (mine, theirs))
        whole = spread([a / b for a, b in zip(*sums, strict=True)])
        assert whole is not None
        return [*found, Verdict("all", "oracle", whole)]

    def curve(self, method: str) -> list[float]:
        """Tokens/s over time: mean over the rounds, smoothed within each phase."""
        out: list[float] = []
        for phase in range(len(PHASES)):
            rows = [self._rows[method, n].tokens[phase] for n in self.rounds]
            out += smooth([sum(column) / len(rows) for column in zip(*rows, strict=True)], SMOOTH_SECONDS)
        return out


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Running mean over the last ``width`` values, fewer at the start."""
    return [statistics.fmean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


def words(results: Results) -> list[list[str]]:
    """The table: a phase a row, every method's tokens/s, the oracle's choice and auto over it."""
    verdicts = {verdict.phase: verdict for verdict in results.verdicts()}
    lines = []
    for phase, name in enumerate(phase.name for phase in PHASES):
        verdict = verdicts.get(name)
        rates = [f"{results.rate(m, phase):.1f}" for m in results.methods]
        lines.append([name, *rates, verdict.best if verdict else "-", str(verdict.ratio) if verdict else "-"])
    if "all" in verdicts:
        totals = [
            f"{sum(results.rate(m, p) for p in range(len(PHASES))) / len(PHASES):.1f}"
            for m in results.methods
        ]
        lines.append(["all", *totals, "the best of each", str(verdicts["all"].ratio)])
    return lines


def header(results: Results) -> list[str]:
    return ["phase, tokens/s", *results.methods, "oracle's choice", "auto / oracle"]


def markdown(rows: Sequence[LoadRow]) -> str:
    """For docs/benchmarks.md."""
    results = Results(rows)
    if not results.rounds:
        raise UserError("no round of the changing load is complete; run it again")
    lines = ["| " + " | ".join(line) + " |" for line in (header(results), *words(results))]
    rule = "| --- " + "| ---: " * (len(header(results)) - 1) + "|"
    facts = f"{results.rows[-1].machine}, {results.seconds} s a phase, {len(results.rounds)} rounds."
    return "\n".join([lines[0], rule, *lines[1:], "", f"Measured on: {facts}"])


def plot(results: Results, title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 4.2), layout="constrained")
    palette = colours(results.methods)
    seconds = results.seconds
    shown = [m for m in (PLAIN, results.best_fixed(), AUTO) if m in results.methods]
    for method in shown:
        curve = results.curve(method)
        label = f"{method} (best fixed width)" if method not in (PLAIN, AUTO) else method
        line = style(method) | {"marker": ""}
        axes.plot([i + 1 for i in range(len(curve))], curve, color=palette[method], label=label, **line)
    if results.verdicts():
        for phase in range(len(PHASES)):
            best = results.best(phase)
            span = (phase * seconds, (phase + 1) * seconds)
            label = "oracle: the best other method of the phase" if phase == 0 else None
            axes.plot(
                span, [results.rate(best, phase)] * 2, color="black", linestyle=":", lw=1.2, label=label
            )
    for phase, what in enumerate(PHASES):
        if phase:
            axes.axvline(phase * seconds, color="0.8", linewidth=1, zorder=0)
        axes.annotate(
            what.name,
            ((phase + 0.5) / len(PHASES), 1.0),
            xycoords="axes fraction",
            xytext=(0, -12),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    axes.set_xlim(0, len(PHASES) * seconds)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * 1.5)
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.set_xlabel("seconds")
    axes.set_ylabel(f"tokens/s, mean of {SMOOTH_SECONDS} s and {len(results.rounds)} rounds")
    axes.legend(fontsize=8, loc="lower left")
    axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


# The run ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    common: command.Common
    prompts: list[Prompt]
    seconds: int
    max_tokens: int

    @property
    def rows_file(self) -> Path:
        return self.common.out / "changing_load.jsonl"


def turn(plan: Plan, fleet: Fleet, method: str, number: int) -> LoadRow:
    url = fleet.use(method)
    tokens = [
        serve_phase(url, phase, Feed(plan.prompts, phase, number), plan.seconds, plan.max_tokens)
        for phase in PHASES
    ]
    fleet.steps(method)
    common = plan.common
    return LoadRow(
        setup=common.setup,
        run=common.run,
        round=number,
        method=method,
        tokens=tokens,
        machine=common.machine,
    )


def run(plan: Plan, rows: list[LoadRow], progress: Progress) -> bool:
    """Measure until all is done or the time is out (False)."""
    common = plan.common
    whole = Results(rows).rounds if rows else []
    done = {n for n in whole if {r.method for r in rows if r.round == n} >= set(common.methods)}
    todo = [n for n in range(common.rounds) if n not in done]
    if not todo:
        return True
    task = progress.add_task("starting the servers", total=None)
    with Fleet(common.pair, common.methods, common.out / "servers", nodes=common.nodes) as fleet:
        short = [Phase("warm-up", ("chat", "code"), 4)]
        for method in common.methods:
            serve_phase(fleet.use(method), short[0], Feed(plan.prompts, short[0], 0), 3, 8)
        progress.update(task, total=len(todo) * len(common.methods), completed=0)
        for number in todo:
            order = random.Random(f"round {number}").sample(common.methods, len(common.methods))
            for method in order:
                if time.monotonic() + len(PHASES) * plan.seconds > common.deadline:
                    return False
                progress.update(task, description=f"round {number + 1} of {common.rounds}: {method}")
                row = turn(plan, fleet, method, number)
                append(plan.rows_file, row)
                rows.append(row)
                progress.advance(task)
    return True


def main(argv: list[str]) -> int:
    parser = command.parser(__doc__, minutes=45.0, methods=METHODS, rounds=3)
    parser.add_argument("--seconds", type=int, default=20, help="of a phase (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens per reply (%(default)s)")
    args = target.parse(parser, argv)
    if args.seconds < 1 or args.max_tokens < 1:
        raise UserError("--seconds and --max-tokens must be above 0")
    prompts = read_prompts(prompts_file())
    common = command.resolve(args, ["load", args.seconds, args.max_tokens, [p.prompt for p in prompts]])
    plan = Plan(common, prompts, args.seconds, args.max_tokens)
    console = Console()
    rows = read_rows(plan.rows_file, LoadRow, common.setup)
    with command.progress(console) as bars:
        done = run(plan, rows, bars)
    results = Results(rows) if rows else None
    if results is None or not results.rounds:
        raise UserError("out of time before the first round was complete; give more --minutes")
    table = Table(title=f"{common.pair.model.name}: a load that changes, medians of rounds", box=SIMPLE_HEAD)
    for i, name in enumerate(header(results)):
        table.add_column(name, justify="right" if i else "left")
    for line in words(results):
        table.add_row(*line)
    console.print(table)
    picture = common.out / "changing_load.png"
    plot(results, f"{common.pair.model.name}: {common.machine}, {common.threads} thread(s) a server", picture)
    console.print(f"wrote {plan.rows_file} and {picture}", highlight=False)
    if not done:
        console.print("out of time: run the same command again for the rest", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(command.main_of(main, sys.argv[1:]))
