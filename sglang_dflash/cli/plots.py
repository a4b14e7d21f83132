"""Pictures of measurements, drawn without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sglang_dflash.client.chat import Reply, mean_accept_length

BLUE, GREY = "#2f6f9f", "#444444"


def accept_length_by_kind(replies: Sequence[Reply], title: str, path: Path) -> None:
    """A bar per prompt kind (tokens per target pass over all passes) and a dot per prompt."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(reply.kind for reply in replies))
    figure, axes = pyplot.subplots(figsize=(5.5, 3.6), layout="constrained")
    for place, kind in enumerate(kinds):
        same = [reply for reply in replies if reply.kind == kind]
        mean = mean_accept_length(same) or 0.0
        axes.bar(place, mean, width=0.55, color=BLUE, alpha=0.75)
        # Below the dots and the line at 1, since no answer takes fewer tokens than passes.
        axes.annotate(f"{mean:.2f}", (place, 0.4), ha="center", color="white", fontsize=14, weight="bold")
        values = [reply.accept_length for reply in same if reply.accept_length is not None]
        # Dots beside each other in the order of the prompts: same place, same prompt, in every run.
        spread = [place + 0.4 * ((index + 0.5) / len(values) - 0.5) for index in range(len(values))]
        axes.plot(spread, values, "o", color="black", markersize=3.5, alpha=0.6)
    axes.axhline(1.0, color=GREY, linewidth=0.8, linestyle="--")
    # Between the bars, where it hides nothing.
    middle = (len(kinds) - 1) / 2 if len(kinds) % 2 == 0 else len(kinds) - 0.6
    axes.annotate("plain\ndecoding", (middle, 1.02), ha="center", va="bottom", fontsize=8, color=GREY)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("accept length (tokens per target pass)")
    axes.set_title(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
