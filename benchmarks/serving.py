"""Throughput, latency and accept length: plain decoding, SGLang's chain, fixed tree widths, and ``auto``.

    python benchmarks/serving.py --minutes 90            # or: make bench
    python benchmarks/serving.py --methods plain,auto,4x4 --concurrency 1,4 -- --dtype float32

Three servers are started in each round and only the measured one is at work; all widths of trees are one
server's. In a round every method answers the same prompts, greedy, at every load, in an order that changes
from round to round; the next round has other prompts. What is compared is a method with another of the same
round, so a machine that is slower for an hour slows both. Every finished cell is one line in
out/serving.jsonl at once; a run that was stopped, or ran out of --minutes, goes on where it was.
docs/benchmarks.md says more.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import command
from command import Common
from fleet import METHODS, Fleet, mode_of
from rich.console import Console
from rich.progress import Progress
from serving_plot import facts, plot, table, verdict_table
from serving_rows import AUTO, Results, Row, append, percentiles, read_rows

from sglang_dflash.cli import target
from sglang_dflash.client.chat import Prompt, Reply, connect, mean_accept_length, read_prompts, stream_reply
from sglang_dflash.errors import UserError
from sglang_dflash.models.prompts import prompts_file

LEVELS = (1, 2, 4, 8, 16, 32)
_WARM_UP_TOKENS = 4
_WARM_UP_REQUESTS = 8
#: What ``auto`` learns from before its first cell, half a minute: requests in flight, requests.
_LEARNING = ((1, 4), (4, 12), (16, 32))
#: A cell has so many times as many prompts as are in flight.
_WAVES = 3


@dataclass(frozen=True)
class Job:
    prompt: Prompt
    max_tokens: int


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        least: jobs of a cell, or three times as many as are in flight where that is more.
        max_tokens: of a reply, on average; each has half of that to half as much again.
        anew: start the servers anew in each round.
    """

    common: Common
    levels: list[int]
    prompts: list[Prompt]
    least: int
    max_tokens: int
    anew: bool = True

    @property
    def rows_file(self) -> Path:
        return self.common.out / "serving.jsonl"

    @property
    def title(self) -> str:
        low, high = span(self.max_tokens)
        return f"{self.common.pair.model.name}, greedy, {low} to {high} tokens a reply"


@dataclass(frozen=True)
class Group:
    """One round of one load: every method once, all with the same jobs."""

    round: int
    level: int
    methods: list[str]
    jobs: list[Job]


def span(max_tokens: int) -> tuple[int, int]:
    """Least and greatest length of a reply. Replies of one length would end, and their successors be read,
    all at once in plain decoding and one by one with drafts: no load that people have."""
    return max(1, max_tokens // 2), max_tokens + max_tokens // 2


def mixed(prompts: Sequence[Prompt]) -> list[Prompt]:
    """All prompts in an order that is always the same, their kinds in turn as long as each has any."""
    kinds: dict[str, list[Prompt]] = {}
    for prompt in random.Random(0).sample(prompts, len(prompts)):
        kinds.setdefault(prompt.kind, []).append(prompt)
    most = max(len(same) for same in kinds.values())
    return [same[i] for i in range(most) for same in kinds.values() if i < len(same)]


def groups(plan: Plan) -> Iterator[Group]:
    """All that is to be measured, in order. Rounds are outermost: at any time all cells have as many."""
    for number in range(plan.common.rounds):
        draw = random.Random(f"round {number}")
        for level in draw.sample(plan.levels, len(plan.levels)):
            count = max(plan.least, _WAVES * level)
            prompts = [plan.prompts[(number * count + i) % len(plan.prompts)] for i in range(count)]
            jobs = [Job(prompt, draw.randint(*span(plan.max_tokens))) for prompt in prompts]
            order = draw.sample(plan.common.methods, len(plan.common.methods))
            yield Group(number, level, order, jobs)


def unfinished(plan: Plan, rows: Sequence[Row]) -> list[Group]:
    """Groups that lack a method. All of such a group is measured again, so that its rows are of one hour."""
    runs: dict[tuple[int, int, str], str] = {(r.round, r.concurrency, r.method): r.run for r in rows}

    def whole(group: Group) -> bool:
        found = {runs.get((group.round, group.level, method)) for method in group.methods}
        return len(found) == 1 and None not in found

    return [group for group in groups(plan) if not whole(group)]


def digest(reply: Reply) -> str:
    return hashlib.sha256(json.dumps(reply.output_ids).encode()).hexdigest()[:16]


def ask_all(url: str, jobs: Sequence[Job], level: int) -> tuple[list[Reply], float]:
    """All jobs with ``level`` requests in flight; seconds from first send to last token."""
    client = connect(url)
    pool = ThreadPoolExecutor(level)
    start = time.perf_counter()
    try:
        replies = list(pool.map(lambda j: stream_reply(client, j.prompt, max_tokens=j.max_tokens), jobs))
        return replies, time.perf_counter() - start
    finally:
        # On Ctrl-C: requests in flight end when the caller stops the server.
        pool.shutdown(wait=False, cancel_futures=True)


def measure(plan: Plan, fleet: Fleet, group: Group, method: str) -> Row:
    replies, seconds = ask_all(fleet.use(method), group.jobs, group.level)
    steps = fleet.steps(method)
    info = fleet.info[mode_of(method)]
    tokens = sum(reply.tokens for reply in replies)
    return Row(
        setup=plan.common.setup,
        run=plan.common.run,
        round=group.round,
        method=method,
        concurrency=group.level,
        requests=len(replies),
        tokens=tokens,
        seconds=round(seconds, 3),
        tokens_per_second=round(tokens / seconds, 3),
        accept_length=mean_accept_length(replies),
        ttft_ms=percentiles([reply.first_token for reply in replies]),
        itl_ms=percentiles([gap for reply in replies for gap in reply.inter_token]),
        outputs={f"{i} {reply.id}": digest(reply) for i, reply in enumerate(replies)},
        widths=steps.shares if steps else None,
        machine=plan.common.machine,
        threads=plan.common.threads,
        device=info.device,
        sglang=info.version,
    )


def warm_up(plan: Plan, fleet: Fleet, progress: Progress) -> None:
    """First passes compile and fill caches; nobody's measurement should hold that."""
    task = progress.add_task("warm-up", total=len(plan.common.methods))
    count = min(_WARM_UP_REQUESTS, max(plan.levels))
    jobs = [Job(prompt, _WARM_UP_TOKENS) for prompt in plan.prompts[:count]]
    for method in plan.common.methods:
        ask_all(fleet.use(method), jobs, count)
        if method == AUTO:
            _learn(plan, fleet.use(method))
        fleet.steps(method)
        progress.advance(task)
    progress.remove_task(task)


def _learn(plan: Plan, url: str) -> None:
    """Cells are of a server that has served a little, not of its first seconds."""
    for level, count in _LEARNING:
        if level <= max(plan.levels):
            ask_all(url, [Job(prompt, plan.max_tokens) for prompt in plan.prompts[-count:]], level)


def run(plan: Plan, todo: Sequence[Group], rows: list[Row], progress: Progress) -> bool:
    """Measure until all is done or the time is out (False); every row is appended to ``rows`` too.

    Servers are started anew for each round, the tree server now last, now first: a process's luck, such as
    where its memory came to lie, is not to be in all rounds' ratios.
    """
    task = progress.add_task("", total=sum(len(group.methods) for group in todo))
    for number, together in groupby(todo, key=lambda group: group.round if plan.anew else 0):
        progress.update(task, description="starting the servers")
        common, odd = plan.common, number % 2 == 1
        folder = common.out / "servers"
        with Fleet(common.pair, common.methods, folder, nodes=common.nodes, tree_first=odd) as fleet:
            warm_up(plan, fleet, progress)
            for group, method in ((g, m) for g in together for m in g.methods):
                if time.monotonic() + _took(rows, group.level, method) > common.deadline:
                    return False
                what = f"round {group.round + 1} of {common.rounds}, {group.level} in flight: {method}"
                progress.update(task, description=what)
                row = measure(plan, fleet, group, method)
                append(plan.rows_file, row)
                rows.append(row)
                progress.advance(task)
    return True


def _took(rows: Sequence[Row], level: int, method: str) -> float:
    """Seconds of the last such cell; 0 where there was none."""
    last = (row.seconds for row in reversed(rows) if (row.concurrency, row.method) == (level, method))
    return next(last, 0.0)


def make_plan(argv: list[str]) -> Plan:
    parser = command.parser(__doc__, minutes=90.0, methods=METHODS, rounds=5)
    parser.add_argument("--concurrency", default=",".join(map(str, LEVELS)), help="(%(default)s)")
    parser.add_argument("--prompts", type=int, default=6, help="least prompts of a cell (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=48, help="mean tokens of a reply (%(default)s)")
    parser.add_argument(
        "--same-servers", action="store_true", help="start them once: a process's luck is in all ratios then"
    )
    args = target.parse(parser, argv)
    levels = command.numbers("--concurrency", args.concurrency)
    if args.prompts < 1 or args.max_tokens < 1:
        raise UserError("--prompts and --max-tokens must be above 0")
    prompts = mixed(read_prompts(prompts_file()))
    words = [p.prompt for p in prompts]
    common = command.resolve(args, [args.max_tokens, args.prompts, args.same_servers, words])
    return Plan(common, levels, prompts, args.prompts, args.max_tokens, not args.same_servers)


def main(argv: list[str]) -> int:
    plan = make_plan(argv)
    console = Console()
    rows = read_rows(plan.rows_file, Row, plan.common.setup)
    todo = unfinished(plan, rows)
    if rows:
        console.print(f"{len(rows)} cells are in {plan.rows_file} already", highlight=False)
    done = True
    if todo:
        with command.progress(console) as bars:
            done = run(plan, todo, rows, bars)
    results = Results(rows)
    if not results.rows:
        raise UserError("out of time before the first cell; give more --minutes")
    console.print(table(results, plan.title))
    console.print(verdict_table(results))
    picture = plan.common.out / "serving.png"
    plot(results, f"{plan.title}: {facts(results.rows[-1], plan.common.rounds)}", picture)
    console.print(f"wrote {plan.rows_file} and {picture}", highlight=False)
    if not done:
        console.print("out of time: run the same command again for the rest", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(command.main_of(main, sys.argv[1:]))
