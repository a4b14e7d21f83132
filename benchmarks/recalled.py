"""What recalled text is worth served, one request in flight: tokens/s over plain decoding, tokens per pass.

    python benchmarks/recalled.py                    # 25 minutes
    python benchmarks/recalled.py --drafter FOLDER   # the same with another drafter, e.g. one with a selector

A plain server and two tree servers, with what the request's own text recalls and without, are started once;
only the measured one works. Every method answers every prompt once a round, the methods in random order, so
that a slow minute of the machine strikes all of them: chat and code (benchmarks/prompts.jsonl), copy and edit
(benchmarks/copy_edit.jsonl), and chat and code at temperature 1. Rows go to out/recalled.jsonl. Prefix caches
are emptied before each answer.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import command
from fleet import Fleet
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from serving_rows import AUTO, PLAIN, ROOT, Measured, append, read_rows

from sglang_dflash.cli import target
from sglang_dflash.client.chat import Prompt, connect, read_prompts, stream_reply
from sglang_dflash.errors import UserError
from sglang_dflash.models.prompts import pick, prompts_file

WIDTHS = ("8x6", "16x6", AUTO)
RECALL = " + recall"
GROUPS = ("chat", "code", "copy and edit", "T = 1")


class RecalledRow(Measured):
    """One answer; ``seconds`` is the decoding alone, from the first token on."""

    group: str
    prompt: str
    tokens: int
    passes: int
    seconds: float
    machine: str


@dataclass(frozen=True)
class Asked:
    group: str
    prompt: Prompt
    temperature: float = 0.0


def asked(per_kind: int) -> list[Asked]:
    """What every method answers in a round."""
    plain = pick(read_prompts(prompts_file()), per_kind)
    edits = read_prompts(ROOT / "benchmarks" / "copy_edit.jsonl")
    return [
        *(Asked(prompt.kind, prompt) for prompt in plain),
        *(Asked("copy and edit", prompt) for prompt in edits),
        *(Asked("T = 1", prompt, 1.0) for prompt in plain[::2]),
    ]


def measure(
    common: command.Common, url: str, method: str, what: Asked, number: int, most: int
) -> RecalledRow:
    reply = stream_reply(
        connect(url), what.prompt, max_tokens=most, temperature=what.temperature, seed=number
    )
    return RecalledRow(
        setup=common.setup,
        run=common.run,
        round=number,
        method=method,
        group=what.group,
        prompt=what.prompt.id,
        tokens=reply.tokens,
        passes=reply.verify_passes,
        seconds=round(reply.seconds - reply.first_token, 4),
        machine=common.machine,
    )


def rates(rows: Sequence[RecalledRow], group: str, method: str) -> list[float]:
    """Tokens/s of every round."""
    mine = [row for row in rows if (row.group, row.method) == (group, method) and row.tokens > 1]
    rounds = sorted({row.round for row in mine})
    each = [[row for row in mine if row.round == number] for number in rounds]
    return [sum(row.tokens - 1 for row in some) / sum(row.seconds for row in some) for some in each]


def per_pass(rows: Sequence[RecalledRow], group: str, method: str) -> float:
    mine = [row for row in rows if (row.group, row.method) == (group, method)]
    return sum(row.tokens - 1 for row in mine) / max(1, sum(row.passes for row in mine))


def table(rows: Sequence[RecalledRow], methods: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: per group and method tokens/s over plain decoding's (median of rounds), per pass."""
    lines = []
    for method in methods:
        line = [method]
        for group in GROUPS:
            plain, mine = rates(rows, group, PLAIN), rates(rows, group, method)
            ratios = [a / b for a, b in zip(mine, plain, strict=False)]
            if not ratios:
                line.append("")
            elif method == PLAIN:
                line.append(f"{statistics.median(mine):.1f} tokens/s")
            else:
                line.append(f"{statistics.median(ratios):.2f}x, {per_pass(rows, group, method):.2f}")
        lines.append(line)
    return ["method", *GROUPS], lines


def main(argv: list[str]) -> int:
    parser = command.parser(__doc__, minutes=40.0, methods=(PLAIN, *WIDTHS), rounds=2)
    parser.add_argument("--prompts", type=int, default=8, help="of chat and of code (%(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer at most (%(default)s)")
    args = target.parse(parser, argv)
    common = command.resolve(args, ["recalled", args.tokens, args.prompts])
    if PLAIN not in common.methods:
        raise UserError("--methods must hold plain: it is what the others are measured by")
    widths = [method for method in common.methods if method != PLAIN]
    methods = [PLAIN, *widths, *(f"{width}{RECALL}" for width in widths)]
    file = common.out / "recalled.jsonl"
    rows = read_rows(file, RecalledRow, common.setup)
    done = {(row.round, row.method, row.group, row.prompt) for row in rows}
    console = Console()
    with ExitStack() as stack:
        fleets = {
            word: stack.enter_context(
                Fleet(
                    common.pair, served, common.out / f"servers-recalled{number}", nodes=common.nodes,
                    env={"SGLANG_DFLASH_RECALL": str(number)},
                )
            )
            for number, (word, served) in enumerate({"": common.methods, RECALL: widths}.items())
        }  # fmt: skip
        bars = stack.enter_context(command.progress(console))
        every = [(number, what) for number in range(common.rounds) for what in asked(args.prompts)]
        task = bars.add_task("", total=len(every) * len(methods))
        for number, what in every:
            order = random.Random(f"{number} {what.prompt.id} {what.group}").sample(methods, len(methods))
            for method in order:
                bars.update(task, description=f"round {number + 1}, {what.group}: {method}", advance=1)
                if (number, method, what.group, what.prompt.id) in done:
                    continue
                if time.monotonic() > common.deadline:
                    break
                url = fleets[RECALL if method.endswith(RECALL) else ""].use(method.removesuffix(RECALL))
                row = measure(common, url, method, what, number, args.tokens)
                append(file, row)
                rows.append(row)
    header, lines = table(rows, methods)
    printed = Table(*header, box=SIMPLE_HEAD)
    for line in lines:
        printed.add_row(*line)
    console.print(printed)
    return 0


if __name__ == "__main__":
    sys.exit(command.main_of(main, sys.argv[1:]))
