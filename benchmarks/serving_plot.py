"""The serving benchmark's results as a table, as Markdown and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from serving_rows import AUTO, CHAIN, PLAIN, Cell, Results, Row, Spread

_SHOWN_WIDTHS = 3


def colours(methods: Sequence[str]) -> dict[str, Any]:
    """Auto stands out, plain is grey, the fixed widths go from light to dark."""
    import matplotlib

    fixed = [m for m in methods if m not in (PLAIN, CHAIN, AUTO)]
    shades = matplotlib.colormaps["YlGn"]
    found: dict[str, Any] = {PLAIN: "0.35", CHAIN: "tab:orange", AUTO: "tab:blue"}
    found |= {m: shades(0.35 + 0.6 * i / max(len(fixed) - 1, 1)) for i, m in enumerate(fixed)}
    return found


def style(method: str) -> dict[str, Any]:
    if method == AUTO:
        return {"linewidth": 2.4, "marker": "o", "zorder": 3}
    return {"linewidth": 1.3, "marker": ".", "linestyle": "--" if method == PLAIN else "-"}


def facts(row: Row, rounds: int) -> str:
    return (
        f"{row.machine}, {row.threads} thread{'s' * (row.threads != '1')} a server, SGLang {row.sglang}, "
        f"greedy, {rounds} rounds"
    )


def _words(cell: Cell) -> dict[str, str]:
    """By column."""
    ratio, itl = cell.vs_plain, cell.itl_ms
    return {
        "tokens/s": f"{cell.tokens_per_second:.1f}",
        "vs plain": f"{ratio.median:.2f}x" if ratio else "-",
        "least to greatest": f"{ratio.low:.2f} to {ratio.high:.2f}" if ratio else "-",
        "accept length": f"{cell.accept_length:.2f}" if cell.accept_length is not None else "-",
        "TTFT p50, ms": f"{cell.ttft_ms:.0f}" if cell.ttft_ms is not None else "-",
        "ITL p50 / p99, ms": f"{itl[0]:.0f} / {itl[1]:.0f}" if itl is not None else "-",
        "same as plain": f"{100 * cell.same:.0f} %" if cell.same is not None else "-",
    }


def widths_text(widths: dict[str, float]) -> str:
    """The commonest widths of ``auto``'s steps."""
    common = sorted(widths.items(), key=lambda item: -item[1])[:_SHOWN_WIDTHS]
    return ", ".join(f"{width} {100 * share:.0f} %" for width, share in common if share >= 0.005)


def table(results: Results, title: str) -> Table:
    """For a terminal of 80 columns: first-token latencies are in docs/benchmarks.md's."""
    shown = {
        "tokens/s": "tokens/s",
        "vs plain": "vs\nplain",
        "least to greatest": "least to\ngreatest",
        "accept length": "accept\nlength",
        "ITL p50 / p99, ms": "ITL, ms\np50 / p99",
        "same as plain": "same as\nplain",
    }
    view = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    view.add_column("in\nflight", justify="right")
    view.add_column("method")
    for name in shown.values():
        view.add_column(name, justify="right", no_wrap=True)
    for level in results.levels:
        for cell in (cell for cell in results.cells() if cell.concurrency == level):
            words = _words(cell)
            bold = "bold" if cell.method == AUTO else ""
            view.add_row(str(level), cell.method, *(words[name] for name in shown), style=bold)
        view.add_section()
    return view


def verdict_table(results: Results) -> Table:
    view = Table(
        title="auto against the best of the others, paired by round",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for name in ("in\nflight", "best of\nthe others", "auto /\nbest", "least to\ngreatest", "auto /\nplain"):
        view.add_column(name, justify="right", no_wrap=True)
    view.add_column("auto's widths")
    for verdict in results.verdicts():
        cell = results.cell(verdict.concurrency, AUTO)
        assert cell is not None
        ratio = verdict.ratio
        view.add_row(
            str(verdict.concurrency),
            verdict.best,
            f"{ratio.median:.2f}",
            f"{ratio.low:.2f} to {ratio.high:.2f}",
            f"{cell.vs_plain.median:.2f}x" if cell.vs_plain else "-",
            widths_text(cell.widths),
        )
    return view


def _row(words: Sequence[str]) -> str:
    return "| " + " | ".join(words) + " |"


def summary_markdown(results: Results) -> str:
    """README's table: a load a row, plain decoding in tokens/s and the others as ratios to it."""
    others = [m for m in results.methods if m != PLAIN]
    verdicts = {v.concurrency: v for v in results.verdicts()}
    lines = [
        _row(["in flight", "plain, tokens/s", *others, "auto / best of the others"]),
        "| ---: " * (len(others) + 3) + "|",
    ]
    for level in results.levels:
        plain = results.cell(level, PLAIN)
        words = [str(level), f"{plain.tokens_per_second:.1f}" if plain else "-"]
        for method in others:
            ratio = results.ratios(level, method, PLAIN)
            text = f"{ratio.median:.2f}x" if ratio else "-"
            words.append(f"**{text}**" if method == AUTO else text)
        verdict = verdicts.get(level)
        words.append(f"{_short(verdict.ratio)} ({verdict.best})" if verdict else "-")
        lines.append(_row(words))
    rounds = [cell.rounds for cell in results.cells()]
    text = facts(results.rows[-1], min(rounds))
    return "\n".join([*lines, "", f"Measured on: {text}. Medians of ratios within a round."])


def _short(ratio: Spread) -> str:
    return f"{ratio.median:.2f}, {ratio.low:.2f} to {ratio.high:.2f}"


def cells_markdown(results: Results) -> str:
    """All cells, for docs/benchmarks.md."""
    lines: list[str] = []
    for cell in results.cells():
        words = _words(cell)
        if not lines:
            lines = [
                _row(["in flight", "method", *words, "auto's widths"]),
                "| ---: | --- " + "| ---: " * len(words) + "| --- |",
            ]
        lines.append(_row([str(cell.concurrency), cell.method, *words.values(), widths_text(cell.widths)]))
    return "\n".join(lines)


def plot(results: Results, title: str, path: Path) -> None:
    """Throughput beside plain decoding's, and what it says of the widths: ``auto`` over the best other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    palette = colours(results.methods)
    for method in results.methods:
        found = [(level, results.ratios(level, method, PLAIN)) for level in results.levels]
        known = [(level, ratio) for level, ratio in found if ratio is not None]
        levels = [level for level, _ in known]
        left.plot(levels, [r.median for _, r in known], color=palette[method], label=method, **style(method))
        if method == AUTO and known:
            low, high = [r.low for _, r in known], [r.high for _, r in known]
            left.fill_between(levels, low, high, color=palette[method], alpha=0.15, linewidth=0)
        gaps = [(c.concurrency, c.itl_ms[0]) for c in results.cells() if c.method == method and c.itl_ms]
        if gaps:
            right.plot(*zip(*gaps, strict=True), color=palette[method], **style(method))
    left.set_ylabel("tokens/s, plain decoding = 1")
    left.set_ylim(bottom=0)
    left.legend(fontsize=8, ncols=2)
    right.set_ylabel("inter-token latency, median, ms")
    if right.lines:
        right.set_yscale("log")
        right.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        right.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        right.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    for axes in (left, right):
        # Limits first: an axis with nothing on it has none of its own that a logarithm could take.
        axes.set_xlim(0.8 * min(results.levels), 1.25 * max(results.levels))
        axes.set_xscale("log", base=2)
        axes.set_xticks(results.levels, [str(level) for level in results.levels])
        axes.set_xlabel("requests in flight")
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
