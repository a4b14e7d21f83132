"""Throughput, latency and accept length of plain decoding, the built-in chain, NGRAM and draft trees.

    python benchmarks/serving.py --minutes 30            # or: make bench
    python benchmarks/serving.py --methods plain,tree --concurrency 1,4 -- --dtype float32

One server per method, the same prompts for all, greedy. Every finished measurement is one line in
out/serving.jsonl at once; a run that was stopped, or ran out of --minutes, goes on where it was.
out/serving.png shows them. A method that cannot start is a line with the reason.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from sglang_dflash.cli import target
from sglang_dflash.client.chat import Prompt, Reply, connect, mean_accept_length, read_prompts, stream_reply
from sglang_dflash.client.info import read_server_info
from sglang_dflash.client.ports import free_port, require_free_port
from sglang_dflash.client.server import Server
from sglang_dflash.errors import UserError
from sglang_dflash.models.cache import make_dir
from sglang_dflash.models.pair import MODES, Mode, mode_environment
from sglang_dflash.models.prompts import pick, prompts_file

METHODS = ("plain", "chain", "ngram", "tree")
_WARM_UP = Prompt(id="warm-up", kind="chat", prompt="Say hello.")


class Percentiles(BaseModel):
    """Milliseconds."""

    p50: float
    p90: float
    p99: float


class Row(BaseModel):
    """One measurement, or the reason why there is none (``error``)."""

    model_config = ConfigDict(extra="forbid")

    setup: str
    method: str
    concurrency: int
    error: str | None = None
    nodes: int | None = None
    requests: int = 0
    tokens: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    accept_length: float | None = None
    ttft_ms: Percentiles | None = None
    itl_ms: Percentiles | None = None
    outputs: dict[str, str] = {}
    machine: str = ""
    threads: str = ""
    device: str | None = None
    sglang: str = ""


@dataclass(frozen=True)
class Plan:
    pair: target.Target
    methods: list[str]
    levels: list[int]
    prompts: list[Prompt]
    max_tokens: int
    deadline: float
    port: int
    out: Path
    setup: str

    @property
    def rows_file(self) -> Path:
        return self.out / "serving.jsonl"


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


def read_rows(path: Path, setup: str) -> dict[tuple[str, int], Row]:
    """Finished rows of the same setup; a line cut off by a crash is left out and measured again."""
    rows: dict[tuple[str, int], Row] = {}
    if not path.exists():
        return rows
    for line in path.read_text().splitlines():
        try:
            row = Row.model_validate_json(line)
        except ValidationError:
            continue
        if row.setup == setup:
            rows[row.method, row.concurrency] = row
    return rows


def append(path: Path, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(row.model_dump_json(exclude_none=True) + "\n")


def server_words(plan: Plan, method: str) -> tuple[list[str], dict[str, str | None]]:
    if method == "ngram":
        return [*plan.pair.flags["plain"], "--speculative-algorithm", "NGRAM"], {
            **plan.pair.env,
            **mode_environment("tree"),
        }
    mode: Mode = next(mode for mode in MODES if mode == method)
    return plan.pair.flags[mode], {**plan.pair.env, **mode_environment(mode)}


def digest(reply: Reply) -> str:
    return hashlib.sha256(json.dumps(reply.output_ids).encode()).hexdigest()[:16]


def one_level(
    plan: Plan, url: str, concurrency: int, tick: Progress, task: object
) -> tuple[list[Reply], float]:
    """All prompts with ``concurrency`` requests in flight; seconds from first send to last token."""
    client = connect(url)

    def send(prompt: Prompt) -> Reply:
        if time.monotonic() > plan.deadline:
            raise TimeoutError
        reply = stream_reply(client, prompt, max_tokens=plan.max_tokens)
        tick.advance(task)  # type: ignore[arg-type]
        return reply

    start = time.perf_counter()
    pool = ThreadPoolExecutor(concurrency)
    try:
        replies = list(pool.map(send, plan.prompts))
    finally:
        # On Ctrl-C or out of time: requests in flight end when the caller stops the server.
        pool.shutdown(wait=False, cancel_futures=True)
    return replies, time.perf_counter() - start


def run_method(plan: Plan, method: str, levels: Sequence[int], progress: Progress) -> list[Row]:
    words, env = server_words(plan, method)
    task = progress.add_task(f"{method}: starting the server", total=None)
    left = plan.deadline - time.monotonic()
    rows: list[Row] = []
    try:
        server = Server(
            words, port=plan.port, log=plan.out / f"serving-{method}.log", env=env, timeout=max(left, 1)
        )
        with server:
            info = read_server_info(server.url)
            if method == "tree" and (info.marker is None or info.marker.mode != "tree"):
                raise UserError(
                    "the server does not use this plugin's tree worker; run `sglang-dflash doctor`"
                )
            client = connect(server.url)
            stream_reply(client, _WARM_UP, max_tokens=16)
            for level in levels:
                progress.reset(task, total=len(plan.prompts), description=f"{method}: concurrency {level}")
                replies, seconds = one_level(plan, server.url, level, progress, task)
                row = Row(
                    setup=plan.setup,
                    method=method,
                    concurrency=level,
                    nodes=info.speculative_num_draft_tokens if info.speculative_algorithm else None,
                    requests=len(replies),
                    tokens=sum(reply.tokens for reply in replies),
                    seconds=round(seconds, 3),
                    tokens_per_second=round(sum(reply.tokens for reply in replies) / seconds, 3),
                    accept_length=mean_accept_length(replies),
                    ttft_ms=percentiles([reply.first_token for reply in replies]),
                    itl_ms=percentiles([gap for reply in replies for gap in reply.inter_token]),
                    outputs={reply.id: digest(reply) for reply in replies},
                    machine=machine(),
                    threads=plan.pair.env["OMP_NUM_THREADS"] or "",
                    device=info.device,
                    sglang=info.version,
                )
                append(plan.rows_file, row)
                rows.append(row)
    except UserError as error:
        if time.monotonic() > plan.deadline:
            raise TimeoutError from error
        row = Row(setup=plan.setup, method=method, concurrency=0, error=str(error))
        append(plan.rows_file, row)
        rows.append(row)
    finally:
        progress.remove_task(task)
    return rows


def same_share(row: Row, rows: dict[tuple[str, int], Row]) -> str:
    """Share of outputs equal to plain decoding's at concurrency 1, as text."""
    plain = rows.get(("plain", 1))
    common = [key for key in row.outputs if plain is not None and key in plain.outputs]
    if not common or plain is None:
        return "-"
    return f"{100 * sum(row.outputs[key] == plain.outputs[key] for key in common) / len(common):.0f} %"


def table(plan: Plan, rows: dict[tuple[str, int], Row]) -> Table:
    view = Table(title=f"{plan.pair.model.name}, greedy, {len(plan.prompts)} prompts")
    view.add_column("method")
    for name in ("in\nflight", "tokens/s", "vs\nplain", "accept\nlength"):
        view.add_column(name, justify="right", no_wrap=True)
    for name in ("TTFT ms\np50 / p99", "ITL ms\np50 / p99", "same as\nplain"):
        view.add_column(name, justify="right", no_wrap=True)
    for method in plan.methods:
        for (name, level), row in sorted(rows.items(), key=lambda item: item[0][1]):
            if name != method or row.error:
                continue
            plain = rows.get(("plain", level))
            ratio = row.tokens_per_second / plain.tokens_per_second if plain else None
            view.add_row(
                method,
                str(level),
                f"{row.tokens_per_second:.1f}",
                f"{ratio:.2f}x" if ratio else "-",
                f"{row.accept_length:.2f}" if row.accept_length else "-",
                *(f"{v.p50:.0f} / {v.p99:.0f}" if v else "-" for v in (row.ttft_ms, row.itl_ms)),
                same_share(row, rows),
            )
        view.add_section()
    return view


def plot(plan: Plan, rows: dict[tuple[str, int], Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for method in plan.methods:
        mine = sorted(
            (row for row in rows.values() if row.method == method and not row.error),
            key=lambda r: r.concurrency,
        )
        if not mine:
            continue
        lengths = [row.accept_length for row in mine if row.accept_length]
        label = method + (f" (accept length {sum(lengths) / len(lengths):.2f})" if lengths else "")
        levels = [row.concurrency for row in mine]
        left.plot(levels, [row.tokens_per_second for row in mine], "o-", label=label)
        right.plot(
            levels, [row.itl_ms.p50 if row.itl_ms else float("nan") for row in mine], "o-", label=method
        )
    for axes, name in ((left, "output tokens/s"), (right, "inter-token latency, median, ms")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(plan.levels, [str(level) for level in plan.levels])
        axes.set_xlabel("requests in flight")
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.suptitle(f"{plan.pair.model.name}: {machine()}", fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _list(text: str, known: Sequence[str] = ()) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    wrong = [part for part in parts if known and part not in known]
    if wrong or not parts:
        raise UserError(f"{text!r} is not a list of: {', '.join(known) or 'numbers'}")
    return parts


def make_plan(argv: list[str]) -> Plan:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    target.add_arguments(parser)
    parser.add_argument("--minutes", type=float, default=30.0, help="time limit of this run (%(default)s)")
    parser.add_argument("--methods", default=",".join(METHODS), help="(%(default)s)")
    parser.add_argument("--concurrency", default="1,2,4,8,16", help="requests in flight (%(default)s)")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of each kind (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens per reply (%(default)s)")
    parser.add_argument("--port", type=int, help="(default: a free one)")
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = target.parse(parser, argv)
    try:
        levels = sorted({int(level) for level in _list(args.concurrency)})
    except ValueError as error:
        raise UserError(f"--concurrency {args.concurrency!r} is not a list of numbers") from error
    if levels[0] < 1 or args.prompts < 1 or args.max_tokens < 1 or args.minutes <= 0:
        raise UserError("--concurrency, --prompts, --max-tokens and --minutes must be above 0")
    methods = _list(args.methods, METHODS)
    deadline = time.monotonic() + 60 * args.minutes
    port = args.port or free_port()
    require_free_port("127.0.0.1", port)
    make_dir(args.out)
    pair = target.resolve(args)
    prompts = pick(read_prompts(prompts_file()), args.prompts)
    # What makes two measurements comparable; another setup starts anew in the same file.
    identity = json.dumps(
        [
            str(pair.model),
            str(pair.drafter),
            args.sglang,
            args.max_tokens,
            [p.id for p in prompts],
            pair.env["OMP_NUM_THREADS"],
            machine(),
        ]
    )
    setup = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return Plan(pair, methods, levels, prompts, args.max_tokens, deadline, port, args.out, setup)


def main(argv: list[str]) -> int:
    plan = make_plan(argv)
    console = Console()
    rows = read_rows(plan.rows_file, plan.setup)
    if rows:
        console.print(f"{len(rows)} measurements are in {plan.rows_file} already", highlight=False)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    out_of_time = False
    with Progress(*columns, console=console) as progress:
        for method in plan.methods:
            todo = [level for level in plan.levels if (method, level) not in rows]
            if not todo or (method, 0) in rows:
                continue
            try:
                run_method(plan, method, todo, progress)
            except TimeoutError:
                out_of_time = True
                break
            finally:
                rows = read_rows(plan.rows_file, plan.setup)
    console.print(table(plan, rows))
    for (method, _), row in rows.items():
        if row.error and method in plan.methods:
            console.print(f"{method} did not run: {row.error}", markup=False, highlight=False)
    if any(not row.error for row in rows.values()):
        plot(plan, rows, plan.out / "serving.png")
        console.print(f"wrote {plan.rows_file} and {plan.out / 'serving.png'}", highlight=False)
    if out_of_time:
        console.print("out of time: run the same command again for the rest", highlight=False)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
