"""``sglang-dflash demo``: the same prompts to plain decoding and to draft trees, and one table.

Starts the plain and the DFLASH server on loopback, at once; sends chat and code prompts greedily through
the ``openai`` client, streamed, first one at a time, then eight in flight. Outputs must be the same: where
two differ, plain decoding's own logit gap at the first different token must be within the dtype's rounding
(a near-tie). Exit code 1 when one is not.

Writes out/demo.png (accept length by prompt kind), out/demo.txt (the tables) and out/demo.json
(everything measured).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

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
from sglang_dflash.cli.options import parser_of
from sglang_dflash.cli.plots import accept_length_by_kind
from sglang_dflash.client.chat import Prompt, Reply, connect, mean_accept_length, read_prompts, stream_reply
from sglang_dflash.client.exact import ServerOracle, Verdict, judge, tally
from sglang_dflash.client.info import ServerInfo, read_server_info
from sglang_dflash.client.ports import free_port, require_free_port
from sglang_dflash.client.server import Server
from sglang_dflash.errors import UserError
from sglang_dflash.models.cache import make_dir
from sglang_dflash.models.pair import MODES, Mode, mode_environment
from sglang_dflash.models.prompts import pick, prompts_file

_WARM_UP = Prompt(id="warm-up", kind="chat", prompt="Say hello.")
IN_FLIGHT = 8  # of the second table


@dataclass(frozen=True)
class Plan:
    """What to run."""

    pair: target.Target
    mode: Mode
    prompts: list[Prompt]
    max_tokens: int
    ports: dict[Mode, int]
    out: Path


@dataclass(frozen=True)
class Run:
    """One server's replies, in the order of the prompts.

    Attributes:
        replies: one request at a time.
        crowd: the same prompts, ``IN_FLIGHT`` at a time, in ``crowd_seconds`` altogether.
    """

    info: ServerInfo
    replies: list[Reply]
    crowd: list[Reply]
    crowd_seconds: float
    start_seconds: float

    def of_kind(self, kind: str | None) -> list[Reply]:
        return [reply for reply in self.replies if kind in (None, reply.kind)]


def tokens_per_second(replies: Sequence[Reply]) -> float:
    """Output tokens over the time from sending a request to its last token, one request at a time."""
    return sum(reply.tokens for reply in replies) / sum(reply.seconds for reply in replies)


def say(progress: Progress, line: str) -> None:
    """A line per stage where the bars are not seen: in a file, in a pipe."""
    if not progress.console.is_terminal:
        progress.console.print(line, highlight=False)


def start_both(plan: Plan, stack: ExitStack, progress: Progress) -> dict[Mode, Server]:
    """The plain and the other server, started side by side; the stack stops them."""
    modes: tuple[Mode, Mode] = ("plain", plan.mode)
    say(progress, f"starting the plain and the {plan.mode} server")
    task = progress.add_task("starting both servers", total=None)
    servers = {
        mode: Server(
            plan.pair.flags[mode],
            port=plan.ports[mode],
            log=plan.out / f"demo-{mode}.log",
            env={**plan.pair.env, **mode_environment(mode)},
            tick=lambda: progress.update(task),
        )
        for mode in modes
    }
    for server in servers.values():
        stack.callback(server.stop)
    # From this thread: a server ends with the thread that launched it.
    for server in servers.values():
        server.launch()
    for server in servers.values():
        server.wait()
    progress.remove_task(task)
    return servers


def measure(plan: Plan, mode: Mode, server: Server, progress: Progress) -> Run:
    check_worker(read_server_info(server.url), mode)
    client = connect(server.url)
    stream_reply(client, _WARM_UP, max_tokens=16)
    task = progress.add_task(f"{mode}: prompts", total=2 * len(plan.prompts))
    replies = []
    for prompt in plan.prompts:
        replies.append(stream_reply(client, prompt, max_tokens=plan.max_tokens))
        speed = tokens_per_second(replies)
        progress.update(task, advance=1, description=f"{mode}: {speed:5.1f} tokens/s")
    say(progress, f"{mode}: {tokens_per_second(replies):.1f} tokens/s, one request at a time")

    def ask(prompt: Prompt) -> Reply:
        reply = stream_reply(client, prompt, max_tokens=plan.max_tokens)
        progress.update(task, advance=1, description=f"{mode}: {IN_FLIGHT} in flight")
        return reply

    begin = time.perf_counter()
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        crowd = list(pool.map(ask, plan.prompts))
    seconds = time.perf_counter() - begin
    say(progress, f"{mode}: {sum(r.tokens for r in crowd) / seconds:.1f} tokens/s, {IN_FLIGHT} in flight")
    return Run(read_server_info(server.url), replies, crowd, seconds, server.start_seconds)


def check_worker(info: ServerInfo, mode: Mode) -> None:
    """A demo that quietly measured SGLang's own chain would be a lie; the server says who works."""
    if mode == "plain":
        return
    marker = info.marker
    if marker is None or marker.mode != mode:
        have = "no marker of this plugin" if marker is None else f"mode {marker.mode} ({marker.worker})"
        raise UserError(f"the DFLASH server runs with {have}, not {mode}; run `sglang-dflash doctor`")


def compare(
    plan: Plan, plain: Run, left: Sequence[Reply], right: Sequence[Reply], url: str, progress: Progress
) -> list[Verdict]:
    """Judge ``right``'s outputs by ``left``'s; the plain server at ``url`` is asked only where two differ."""
    pairs = list(zip(left, right, strict=True))
    if all(one.output_ids == other.output_ids for one, other in pairs):
        return [Verdict("identical") for _ in pairs]
    oracle = ServerOracle(url, plan.pair.vocab_size)
    try:
        dtype = resolve_dtype(plain.info)
        verdicts = []
        for one, other in progress.track(pairs, description="plain: looking at the differences"):
            verdicts.append(judge(oracle, one.prompt_ids, one.output_ids, other.output_ids, dtype))
        return verdicts
    finally:
        oracle.close()


def resolve_dtype(info: ServerInfo) -> str:
    """The dtype a server computes in; "auto" is what the model's config says."""
    if info.dtype not in ("auto", "half"):
        return {"float": "float32"}.get(info.dtype, info.dtype)
    if info.dtype == "half":
        return "float16"
    config = json.loads((Path(info.model_path) / "config.json").read_text())
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    # SGLang's rule for "auto": float32 checkpoints are served in float16.
    return "float16" if dtype == "float32" else dtype


def add_columns(table: Table, mode: Mode) -> None:
    table.add_column("prompts")
    for column in ("plain\ntokens/s", f"{mode}\ntokens/s", "ratio", "accept\nlength", "identical\noutputs"):
        table.add_column(column, justify="right", no_wrap=True)


def crowd_table(plan: Plan, plain: Run, other: Run, verdicts: Sequence[Verdict]) -> Table:
    table = Table(title=f"the same, {IN_FLIGHT} requests in flight")
    add_columns(table, plan.mode)
    before, after = (sum(r.tokens for r in run.crowd) / run.crowd_seconds for run in (plain, other))
    same = tally(verdicts)
    table.add_row(
        f"all ({same.total})",
        f"{before:.1f}",
        f"{after:.1f}",
        f"{after / before:.2f}x",
        f"{mean_accept_length(other.crowd) or 1:.2f}",
        f"{100 * same.identical / same.total:.0f} %",
        style="bold",
    )
    return table


def show(
    plan: Plan,
    plain: Run,
    other: Run,
    verdicts: Sequence[Verdict],
    crowd_verdicts: Sequence[Verdict],
    console: Console,
) -> None:
    table = Table(title=f"{Path(plain.info.model_path).name}, greedy, one request at a time")
    add_columns(table, plan.mode)
    kinds: list[str | None] = [*dict.fromkeys(prompt.kind for prompt in plan.prompts), None]
    for kind in kinds:
        before, after = tokens_per_second(plain.of_kind(kind)), tokens_per_second(other.of_kind(kind))
        judged = [v for v, r in zip(verdicts, plain.replies, strict=True) if kind in (None, r.kind)]
        same = tally(judged)
        table.add_row(
            f"{kind or 'all'} ({same.total})",
            f"{before:.1f}",
            f"{after:.1f}",
            f"{after / before:.2f}x",
            f"{mean_accept_length(other.of_kind(kind)) or 1:.2f}",
            f"{100 * same.identical / same.total:.0f} %",
            style="bold" if kind is None else "",
            end_section=kind is None or kind == kinds[-2],
        )
    console.print(table, crowd_table(plan, plain, other, crowd_verdicts))
    everything = [*verdicts, *crowd_verdicts]
    for verdict, reply in zip(everything, [*plain.replies, *plain.crowd], strict=True):
        if verdict.kind != "identical":
            console.print(f"{reply.id}: {verdict}", highlight=False, markup=False)
    counts = tally(everything)
    console.print(
        f"exact: {'yes' if counts.ok else 'NO'} ({counts}; a near-tie is a first difference where plain "
        f"decoding's own logit gap is within {resolve_dtype(plain.info)} rounding)",
        highlight=False,
    )


def write(plan: Plan, plain: Run, other: Run, verdicts: Sequence[Verdict]) -> list[Path]:
    title = (
        f"{Path(plain.info.model_path).name}: {plan.mode}, {other.info.speculative_num_draft_tokens} nodes"
    )
    picture, data = plan.out / "demo.png", plan.out / "demo.json"
    accept_length_by_kind(other.replies, title, picture)
    content = {
        "model": plain.info.model_path,
        "mode": plan.mode,
        "threads": plan.pair.env.get("OMP_NUM_THREADS"),
        "start_seconds": {"plain": plain.start_seconds, plan.mode: other.start_seconds},
        "plain": [asdict(reply) for reply in plain.replies],
        plan.mode: [asdict(reply) for reply in other.replies],
        "in_flight": IN_FLIGHT,
        "crowd_seconds": {"plain": plain.crowd_seconds, plan.mode: other.crowd_seconds},
        "verdicts": [asdict(verdict) for verdict in verdicts],
    }
    data.write_text(json.dumps(content, indent=1) + "\n")
    return [picture, data]


def make_plan(argv: list[str]) -> Plan:
    parser = parser_of(__doc__, "sglang-dflash demo")
    target.add_arguments(parser)
    parser.add_argument("--prompts", type=int, default=8, help="prompts of each kind (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=32, help="tokens per reply (%(default)s)")
    parser.add_argument("--mode", choices=[mode for mode in MODES if mode != "plain"], default="tree")
    parser.add_argument("--prompt-file", type=Path, help="JSON lines with id, kind and prompt")
    parser.add_argument("--port", type=int, help="plain server's, the next is the other's (default: free)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for results (%(default)s)")
    args = target.parse(parser, argv)
    if args.prompts < 1 or args.max_tokens < 1:
        raise UserError("--prompts and --max-tokens must be at least 1")
    prompts = pick(read_prompts(args.prompt_file or prompts_file()), args.prompts)
    first = args.port or free_port()
    ports: dict[Mode, int] = {"plain": first, args.mode: first + 1 if args.port else free_port()}
    for port in ports.values():
        require_free_port("127.0.0.1", port)
    make_dir(args.out)
    return Plan(target.resolve(args, side_by_side=2), args.mode, prompts, args.max_tokens, ports, args.out)


def main(argv: list[str]) -> int:
    plan = make_plan(argv)
    console = Console()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with ExitStack() as stack, Progress(*columns, console=console) as progress:
        servers = start_both(plan, stack, progress)
        plain = measure(plan, "plain", servers["plain"], progress)
        other = measure(plan, plan.mode, servers[plan.mode], progress)
        url = servers["plain"].url
        verdicts = compare(plan, plain, plain.replies, other.replies, url, progress)
        crowd_verdicts = compare(plan, plain, plain.replies, other.crowd, url, progress)
    report = Console(record=True, width=min(console.width, 100))
    show(plan, plain, other, verdicts, crowd_verdicts, report)
    (plan.out / "demo.txt").write_text(report.export_text())
    for path in write(plan, plain, other, verdicts):
        console.print(f"wrote {path}", highlight=False)
    return 0 if tally([*verdicts, *crowd_verdicts]).ok else 1
