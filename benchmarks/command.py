"""What the serving benchmarks' command lines share: the pair, the methods, the rounds and the time limit."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fleet import NODES, check_methods
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from serving_rows import code, machine

from sglang_dflash.cli import target
from sglang_dflash.errors import UserError
from sglang_dflash.models.cache import make_dir


@dataclass(frozen=True)
class Common:
    """What was asked for.

    Attributes:
        deadline: by ``time.monotonic``.
        setup: digest of all that two measurements must share to be compared.
        run: when this command was started.
    """

    pair: target.Target
    methods: list[str]
    nodes: int
    rounds: int
    deadline: float
    out: Path
    setup: str
    run: str
    machine: str

    @property
    def threads(self) -> str:
        return self.pair.env["OMP_NUM_THREADS"] or ""


def parser(
    doc: str | None, *, minutes: float, methods: Sequence[str], rounds: int
) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    target.add_arguments(made)
    made.add_argument("--minutes", type=float, default=minutes, help="time limit of this run (%(default)s)")
    made.add_argument("--rounds", type=int, default=rounds, help="of every cell (%(default)s)")
    made.add_argument(
        "--methods", default=",".join(methods), help="plain, chain, auto, 1x1, NxB (%(default)s)"
    )
    made.add_argument(
        "--nodes", type=int, default=NODES, help="--speculative-num-draft-tokens of trees (%(default)s)"
    )
    made.add_argument(
        "--threads",
        default=os.environ.get("OMP_NUM_THREADS") or "1",
        help="of every server: OMP_NUM_THREADS (%(default)s)",
    )
    made.add_argument("--out", type=Path, default=Path("out"))
    return made


def resolve(args: argparse.Namespace, identity: Sequence[Any]) -> Common:
    """Check what was asked for and fetch what is missing; raises UserError.

    Args:
        args: of a :func:`parser`, parsed by ``target.parse``.
        identity: what else two measurements must share, as JSON.
    """
    if args.rounds < 1 or args.nodes < 1 or args.minutes <= 0:
        raise UserError("--rounds, --nodes and --minutes must be above 0")
    if not args.threads.isdecimal() or int(args.threads) < 1:
        raise UserError(f"--threads {args.threads!r} is not a number of threads")
    deadline = time.monotonic() + 60 * args.minutes
    pair = target.resolve(args)
    pair = replace(pair, env={**pair.env, "OMP_NUM_THREADS": args.threads})
    methods = words(args.methods)
    check_methods(methods, pair, args.nodes)
    make_dir(args.out)
    known = [str(pair.model), str(pair.drafter), args.sglang, args.nodes, args.threads, machine(), code()]
    setup = hashlib.sha256(json.dumps([*known, *identity]).encode()).hexdigest()[:12]
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Common(pair, methods, args.nodes, args.rounds, deadline, args.out, setup, now, machine())


def words(text: str) -> list[str]:
    """A comma-separated list, without repetitions."""
    parts = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise UserError(f"{text!r} is an empty list")
    return parts


def numbers(option: str, text: str) -> list[int]:
    """A comma-separated list of numbers above 0, ascending."""
    try:
        found = sorted({int(part) for part in words(text)})
    except ValueError as error:
        raise UserError(f"{option} {text!r} is not a list of numbers") from error
    if found[0] < 1:
        raise UserError(f"{option} must be above 0")
    return found


def progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def main_of(main: Any, argv: Sequence[str]) -> int:
    """The exit code of a command: a mistake is one line, Ctrl-C is no mistake."""
    import sys

    try:
        return int(main(list(argv)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
