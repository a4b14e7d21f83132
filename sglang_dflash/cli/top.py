"""``sglang-dflash top``: what a running server does right now, refreshed in place; Ctrl-C ends it.

The server must run with --enable-metrics.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table

from sglang_dflash.cli.options import parser_of
from sglang_dflash.client.access import OPTION_HELP
from sglang_dflash.client.flags import DEFAULT_HOST, DEFAULT_PORT
from sglang_dflash.client.metrics import PREFIX, Scrape, read_metrics
from sglang_dflash.errors import UserError

BAR = 24


@dataclass(frozen=True)
class Frame:
    """One picture of the server. Rates and means are over the time since the last frame, or, in the
    first, since the server started; None where nothing was decoded in that time.

    Attributes:
        shares: share of request steps by accept length, as (upper bound, share), in order.
        off_spine: share of request steps.
        rows_moved: per request step.
        fallbacks: since the server started.
        drafter_ms, verify_ms: per decode step of the whole batch.
        widths: share of decode steps by width (nodes x block), the most frequent first.
    """

    model: str
    running: int
    queued: int
    kv_use: float
    tokens_per_second: float
    accept_length: float | None
    width: float | None
    off_spine: float | None
    rows_moved: float | None
    fallbacks: int
    drafter_ms: float | None
    verify_ms: float | None
    shares: list[tuple[str, float]]
    widths: list[tuple[str, float]]


def frame(now: Scrape, before: Scrape | None, seconds: float) -> Frame:
    """Add up two readings ``seconds`` apart; ``before`` is None for the first.

    Raises UserError when the server has no draft trees.
    """
    if not now.has(f"{PREFIX}accept_length_count"):
        raise UserError(
            "this server exports no metrics of draft trees; it serves plain decoding or the built-in chain "
            "(sglang-dflash doctor --url tells which)"
        )

    def grown(name: str, **labels: str) -> float:
        value = now.total(PREFIX + name, **labels)
        return value if before is None else value - before.total(PREFIX + name, **labels)

    steps = grown("accept_length_count")

    def per_step(name: str) -> float | None:
        return grown(name) / steps if steps > 0 else None

    def milliseconds(name: str) -> float | None:
        batches = grown("decode_steps_total")
        return 1e3 * grown(name) / batches if batches > 0 else None

    def gauge(name: str) -> float:
        return now.total(f"sglang:{name}")

    return Frame(
        model=next((s.labels.get("model_name", "") for s in now.samples if s.name.startswith(PREFIX)), ""),
        running=int(gauge("num_running_reqs")),
        queued=int(gauge("num_queue_reqs")),
        kv_use=now.greatest("sglang:token_usage"),
        tokens_per_second=gauge("gen_throughput") if before is None else grown("accept_length_sum") / seconds,
        accept_length=per_step("accept_length_sum"),
        width=per_step("tree_width_sum"),
        off_spine=per_step("off_spine_accepts_total"),
        rows_moved=per_step("kv_rows_moved_total"),
        fallbacks=int(now.total(f"{PREFIX}drafter_fallbacks_total")),
        drafter_ms=milliseconds("drafter_seconds_total"),
        verify_ms=milliseconds("verify_seconds_total"),
        shares=list(_shares(now, grown, steps)),
        widths=_widths(now, grown),
    )


def _widths(now: Scrape, grown: Callable[..., float]) -> list[tuple[str, float]]:
    name = "width_steps_total"
    found = {sample.labels["width"] for sample in now.samples if sample.name == PREFIX + name}
    counts = {width: grown(name, width=width) for width in sorted(found)}
    total = sum(counts.values())
    if total <= 0:
        return []
    return sorted(((w, c / total) for w, c in counts.items() if c > 0), key=lambda item: -item[1])


def _shares(now: Scrape, grown: Callable[..., float], steps: float) -> Iterator[tuple[str, float]]:
    name = f"{PREFIX}accept_length_bucket"
    bounds = sorted({sample.labels["le"] for sample in now.samples if sample.name == name}, key=float)
    below = 0.0
    for bound in bounds:
        count = grown("accept_length_bucket", le=bound)
        if steps > 0 and count > below:
            yield bound.removesuffix(".0"), (count - below) / steps
        below = count


def _number(value: float | None, text: str = "{:.2f}") -> str:
    return "-" if value is None else text.format(value)


def _mix(widths: list[tuple[str, float]]) -> str:
    """The most frequent widths; 1x1 is a plain step."""
    named = [("plain" if width == "1x1" else width, share) for width, share in widths[:4]]
    return "nodes x block; " + ", ".join(f"{share:.0%} {width}" for width, share in named) if named else ""


def render(picture: Frame, url: str) -> Panel:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column()
    table.add_row("accept length", _number(picture.accept_length), "tokens per target pass")
    table.add_row("tokens/s", f"{picture.tokens_per_second:.1f}", "")
    table.add_row("running", str(picture.running), f"queue {picture.queued}")
    table.add_row("width", _number(picture.width, "{:.1f}"), "nodes verified per request and step")
    table.add_row("in force", picture.widths[0][0] if picture.widths else "-", _mix(picture.widths))
    table.add_row("off the spine", _number(picture.off_spine, "{:.1%}"), "of request steps")
    table.add_row("KV rows moved", _number(picture.rows_moved), "per request step")
    table.add_row("KV in use", f"{picture.kv_use:.1%}", "of the pool")
    table.add_row("drafter", _number(picture.drafter_ms, "{:.1f}"), "ms per step of the batch")
    table.add_row("verify", _number(picture.verify_ms, "{:.1f}"), "ms per step of the batch")
    style = "red" if picture.fallbacks else ""
    table.add_row("fallbacks", str(picture.fallbacks), "since the start", style=style)
    if picture.shares:
        table.add_row("", "", "")
    for bound, share in picture.shares:
        table.add_row(f"  accepted {bound}", f"{share:.1%}", "█" * round(share * BAR))
    return Panel(table, title=f"{picture.model} at {url}", title_align="left", expand=False)


def pictures(url: str, every: float, api_key: str | None = None) -> Iterator[Panel]:
    """A frame now and one every ``every`` seconds."""
    before, at = None, time.monotonic()
    while True:
        now, read = read_metrics(url, api_key=api_key), time.monotonic()
        yield render(frame(now, before, max(read - at, 1e-3)), url)
        before, at = now, read
        time.sleep(every)


def main(argv: list[str]) -> int:
    parser = parser_of(__doc__, "sglang-dflash top")
    parser.add_argument("--url", default=f"http://{DEFAULT_HOST}:{DEFAULT_PORT}", help="default: %(default)s")
    parser.add_argument("--api-key", help=OPTION_HELP)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between frames (%(default)s)")
    parser.add_argument("--once", action="store_true", help="print one frame and stop")
    args = parser.parse_args(argv)
    if args.every <= 0:
        raise UserError("--every takes seconds above 0")
    console = Console()
    frames = pictures(args.url, args.every, args.api_key)
    first = next(frames)
    if args.once:
        console.print(first)
        return 0
    try:
        with Live(first, console=console, auto_refresh=False) as live:
            for picture in frames:
                live.update(picture, refresh=True)
    except KeyboardInterrupt:
        pass
    return 0
