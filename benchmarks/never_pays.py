"""What ``auto`` costs where drafting never pays, and of what that is made.

    python benchmarks/never_pays.py --minutes 40         # or: make bench-off

Two kinds of prompts that no drafter can help with, 16 and 32 in flight:

- ``wrong``: greedy, and every candidate of the drafter becomes another token after it has said how sure
  it is (benchmarks/useless_drafts.py). The policy has to find out that a confident drafter is always wrong.
- ``noise``: text at temperature 2 with a seed. The drafter knows that it knows nothing.

Plain decoding, ``1x1`` (the tree worker's plain step and nothing else) and ``auto`` emit the same number of
tokens. 1x1 over plain is what it costs to be ready to draft, the drafter's K and V of every token
("projection") and the rest of the host's work; auto over 1x1 is what the policy spends on probes and wrong
choices. Rows go to out/never_pays.jsonl, resumable.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import command
import httpx
from fleet import Fleet, importable, mode_of
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from serving_rows import AUTO, PLAIN, Measured, append, read_rows, spread

from sglang_dflash.cli import target
from sglang_dflash.client.chat import Prompt, read_prompts
from sglang_dflash.client.metrics import PREFIX, read_metrics
from sglang_dflash.errors import UserError
from sglang_dflash.models.prompts import prompts_file

READY = "1x1"
METHODS = (PLAIN, READY, AUTO)
KINDS = ("wrong", "noise")
_PARTS = ("drafter_seconds", "verify_seconds", "commit_seconds")


class OffRow(Measured):
    """One method's turn at a load.

    Attributes:
        parts: seconds of all its decode steps by part, and ``decode_steps``; None of plain decoding.
        probes: of ``auto``.
        wide: share of ``auto``'s steps that were not plain.
    """

    kind: str
    concurrency: int
    tokens: int
    seconds: float
    parts: dict[str, float] | None = None
    probes: int | None = None
    wide: float | None = None
    machine: str


@dataclass(frozen=True)
class Plan:
    common: command.Common
    prompts: list[Prompt]
    kinds: list[str]
    levels: list[int]
    tokens: int

    @property
    def rows_file(self) -> Path:
        return self.common.out / "never_pays.jsonl"


@dataclass(frozen=True)
class Group:
    """One round of one kind at one load, every method once."""

    round: int
    kind: str
    level: int
    methods: list[str]


def bodies(plan: Plan, kind: str, level: int, number: int) -> list[dict[str, Any]]:
    """``/generate`` requests of a round: the same for every method, of a fixed number of tokens."""
    draw = random.Random(f"{kind} {level} {number}")
    sampling: dict[str, Any] = {"max_new_tokens": plan.tokens, "ignore_eos": True, "temperature": 0}
    chosen = draw.choices(plan.prompts, k=level)
    out = []
    for i, prompt in enumerate(chosen):
        more = {"temperature": 2.0, "sampling_seed": 1000 * number + i} if kind == "noise" else {}
        out.append({"text": f"{i}. {prompt.prompt}\n", "sampling_params": sampling | more})
    return out


def ask_all(url: str, requests: Sequence[dict[str, Any]]) -> tuple[int, float]:
    """All at once; (tokens, seconds until the last has ended)."""
    with httpx.Client(timeout=900.0, trust_env=False, limits=httpx.Limits(max_connections=None)) as http:

        def ask(body: dict[str, Any]) -> int:
            reply = http.post(f"{url}/generate", json=body)
            reply.raise_for_status()
            return int(reply.json()["meta_info"]["completion_tokens"])

        start = time.perf_counter()
        with ThreadPoolExecutor(len(requests)) as pool:
            tokens = sum(pool.map(ask, requests))
        return tokens, time.perf_counter() - start


def parts_of(url: str) -> dict[str, float]:
    """The tree server's clocks and count of steps since its start."""
    scrape = read_metrics(url)
    return {name: scrape.total(f"{PREFIX}{name}_total") for name in (*_PARTS, "decode_steps")}


def measure(plan: Plan, fleet: Fleet, group: Group, method: str) -> OffRow:
    url = fleet.use(method)
    trees = mode_of(method) == "tree"
    before = parts_of(url) if trees else {}
    tokens, seconds = ask_all(url, bodies(plan, group.kind, group.level, group.round))
    steps = fleet.steps(method)
    now = parts_of(url) if trees else {}
    return OffRow(
        setup=plan.common.setup,
        run=plan.common.run,
        round=group.round,
        method=method,
        kind=group.kind,
        concurrency=group.level,
        tokens=tokens,
        seconds=round(seconds, 3),
        parts={name: round(now[name] - before[name], 4) for name in now} or None,
        probes=steps.probes if steps else None,
        wide=round(1.0 - steps.shares.get(READY, 0.0), 4) if steps else None,
        machine=plan.common.machine,
    )


# What rows say ---------------------------------------------------------------------------------------------

Key = tuple[str, int, int]


@dataclass(frozen=True)
class Loss:
    """A kind at a load: medians over the rounds. All but the rates are shares of plain decoding's time.

    Attributes:
        ratio, ready: tokens/s of auto, and of 1x1, over plain decoding's.
        projection: the drafter's K and V of every token, in 1x1.
        host: all else that 1x1 takes longer than plain decoding.
        probes: what auto takes longer than 1x1.
        drafting: of the latter, the drafter's passes.
        count: probes of a turn.
        wide: share of auto's steps that drafted.
    """

    kind: str
    concurrency: int
    rounds: int
    plain: float
    ratio: float
    ratios: str
    ready: float
    projection: float
    host: float
    probes: float
    drafting: float
    count: float
    wide: float


def losses(rows: Sequence[OffRow]) -> list[Loss]:
    """Of whole rounds only: those in which all three methods had their turn in one run."""
    turns: dict[Key, dict[str, OffRow]] = {}
    for row in rows:
        turns.setdefault((row.kind, row.concurrency, row.round), {})[row.method] = row
    whole = {
        key: turn
        for key, turn in turns.items()
        if set(turn) >= set(METHODS) and len({turn[m].run for m in METHODS}) == 1
    }
    found = []
    for kind, level in sorted({key[:2] for key in whole}, key=lambda k: (KINDS.index(k[0]), k[1])):
        mine = [turn for key, turn in whole.items() if key[:2] == (kind, level)]
        found.append(_loss(kind, level, mine))
    return found


def _loss(kind: str, level: int, turns: Sequence[dict[str, OffRow]]) -> Loss:
    def middle(value: Callable[[OffRow, OffRow, OffRow], float]) -> float:
        return statistics.median(value(*(turn[m] for m in METHODS)) for turn in turns)

    def part(row: OffRow, name: str) -> float:
        return row.parts[name] if row.parts else 0.0

    ratio = spread([_rate(turn[AUTO]) / _rate(turn[PLAIN]) for turn in turns])
    assert ratio is not None
    return Loss(
        kind,
        level,
        len(turns),
        plain=middle(lambda p, r, a: _rate(p)),
        ratio=ratio.median,
        ratios=str(ratio),
        ready=middle(lambda p, r, a: _rate(r) / _rate(p)),
        projection=middle(lambda p, r, a: part(r, "commit_seconds") / p.seconds),
        host=middle(lambda p, r, a: (r.seconds - part(r, "commit_seconds")) / p.seconds - 1.0),
        probes=middle(lambda p, r, a: (a.seconds - r.seconds) / p.seconds),
        drafting=middle(lambda p, r, a: part(a, "drafter_seconds") / p.seconds),
        count=middle(lambda p, r, a: float(a.probes or 0)),
        wide=middle(lambda p, r, a: a.wide or 0.0),
    )


def _rate(row: OffRow) -> float:
    return row.tokens / row.seconds


HEADER = (
    *("drafts", "in flight", "plain, tokens/s", "1x1 / plain", "auto / plain"),
    *("projection", "host", "probes", "of them drafter", "probes a turn", "steps that draft"),
)


def words(loss: Loss) -> list[str]:
    shares = (loss.projection, loss.host, loss.probes, loss.drafting)
    return [
        loss.kind,
        str(loss.concurrency),
        f"{loss.plain:.1f}",
        f"{loss.ready:.3f}",
        loss.ratios,
        *(f"{100 * share:+.1f} %" for share in shares),
        f"{loss.count:.0f}",
        f"{100 * loss.wide:.1f} %",
    ]


def markdown(rows: Sequence[OffRow]) -> str:
    """For docs/benchmarks.md."""
    found = losses(rows)
    if not found:
        raise UserError("no round of benchmarks/never_pays.py is complete; run it again")
    lines = ["| " + " | ".join(line) + " |" for line in (HEADER, *map(words, found))]
    rule = "| --- " + "| ---: " * (len(HEADER) - 1) + "|"
    facts = f"{rows[-1].machine}, {min(loss.rounds for loss in found)} rounds."
    return "\n".join([lines[0], rule, *lines[1:], "", f"Measured on: {facts}"])


# The run ---------------------------------------------------------------------------------------------------


def unfinished(plan: Plan, rows: Sequence[OffRow]) -> list[Group]:
    """Groups that lack a method; all of such a group is measured again."""
    runs = {(r.kind, r.concurrency, r.round, r.method): r.run for r in rows}
    todo = []
    for number in range(plan.common.rounds):
        draw = random.Random(f"round {number}")
        cells = [(kind, level) for kind in plan.kinds for level in plan.levels]
        for kind, level in draw.sample(cells, len(cells)):
            found = {runs.get((kind, level, number, method)) for method in METHODS}
            if len(found) != 1 or None in found:
                todo.append(Group(number, kind, level, draw.sample(METHODS, len(METHODS))))
    return todo


def run(plan: Plan, rows: list[OffRow], progress: Progress) -> bool:
    """Measure until all is done or the time is out (False). Servers are started anew for each round, see
    `serving.run`: here a per cent is a finding."""
    common = plan.common
    todo = unfinished(plan, rows)
    task = progress.add_task("", total=len(todo) * len(METHODS))
    env = {"SGLANG_DFLASH_CANDIDATES": "benchmarks.useless_drafts:candidates", **importable()}
    folder = common.out / "servers-off"
    for number, of_round in groupby(todo, key=lambda group: group.round):
        what = f"round {number + 1} of {common.rounds}"
        progress.update(task, description=f"{what}: starting the servers")
        more = {"nodes": common.nodes, "flags": ["--enable-metrics"], "env": env}
        with Fleet(common.pair, METHODS, folder, **more, tree_first=number % 2 == 1) as fleet:
            warm_up(plan, fleet)
            for group, method in ((g, m) for g in of_round for m in g.methods):
                if time.monotonic() + _took(rows, group, method) > common.deadline:
                    return False
                progress.update(task, description=f"{what}, {group.kind}, {group.level}: {method}")
                row = measure(plan, fleet, group, method)
                append(plan.rows_file, row)
                rows.append(row)
                progress.advance(task)
    return True


def warm_up(plan: Plan, fleet: Fleet) -> None:
    for method in METHODS:
        for kind in KINDS:
            ask_all(fleet.use(method), bodies(plan, kind, 4, plan.common.rounds))
        fleet.steps(method)


def _took(rows: Sequence[OffRow], group: Group, method: str) -> float:
    """Seconds of the last such turn; 0 where there was none."""
    cell = (group.kind, group.level, method)
    last = (row.seconds for row in reversed(rows) if (row.kind, row.concurrency, row.method) == cell)
    return next(last, 0.0)


def main(argv: list[str]) -> int:
    parser = command.parser(__doc__, minutes=40.0, methods=METHODS, rounds=5)
    parser.add_argument("--drafts", default=",".join(KINDS), help="wrong, noise (%(default)s)")
    parser.add_argument("--concurrency", default="16,32", help="requests in flight (%(default)s)")
    parser.add_argument("--tokens", type=int, default=96, help="of every request (%(default)s)")
    args = target.parse(parser, argv)
    kinds, levels = command.words(args.drafts), command.numbers("--concurrency", args.concurrency)
    if set(kinds) - set(KINDS):
        raise UserError(f"--drafts {args.drafts!r} is not a list of: {', '.join(KINDS)}")
    if args.tokens < 1:
        raise UserError("--tokens must be above 0")
    prompts = read_prompts(prompts_file())
    common = command.resolve(args, ["off", args.tokens, [p.prompt for p in prompts]])
    if set(common.methods) != set(METHODS):
        raise UserError(
            f"--methods is always {','.join(METHODS)} here: the parts of the loss need all of them"
        )
    plan = Plan(common, prompts, kinds, levels, args.tokens)
    console = Console()
    rows = read_rows(plan.rows_file, OffRow, common.setup)
    with command.progress(console) as bars:
        done = run(plan, rows, bars)
    found = losses(rows)
    if not found:
        raise UserError("out of time before the first round was complete; give more --minutes")
    table = Table(
        title="drafts that never pay; shares are of plain decoding's time, medians of rounds", box=SIMPLE_HEAD
    )
    for i, name in enumerate(HEADER):
        table.add_column(name, justify="right" if i else "left")
    for loss in found:
        table.add_row(*words(loss))
    console.print(table)
    console.print(f"wrote {plan.rows_file}", highlight=False)
    if not done:
        console.print("out of time: run the same command again for the rest", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(command.main_of(main, sys.argv[1:]))
