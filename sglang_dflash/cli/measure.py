"""``sglang-dflash measure``: what steps cost on this machine, and what each width would bring.

Starts the server of the pair, which measures its steps (or takes the table that an earlier start kept),
serves nothing, and prints the table and the predicted tokens/s by requests in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sglang_dflash.cli import target
from sglang_dflash.cli.options import parser_of
from sglang_dflash.client.info import read_server_info
from sglang_dflash.client.ports import free_port, require_free_port
from sglang_dflash.client.server import Server
from sglang_dflash.drafter import read_config
from sglang_dflash.errors import UserError
from sglang_dflash.models.cache import make_dir
from sglang_dflash.models.pair import mode_environment
from sglang_dflash.step.width import PLAIN, Width
from sglang_dflash.worker.width.cost import CostFile, CostTable, load
from sglang_dflash.worker.width.gain import Gains
from sglang_dflash.worker.width.tiers import tiers_up_to

LEVELS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Forecast:
    """Predicted tokens/s.

    Attributes:
        levels: requests in flight.
        rates: by width, one number per level.
        best: the width of the greatest rate, per level.
    """

    levels: Sequence[int]
    rates: dict[Width, list[float]]
    best: list[Width]

    @property
    def auto(self) -> list[float]:
        return [self.rates[width][i] for i, width in enumerate(self.best)]


def forecast(
    cost: CostTable, gains: Gains, widest: Width, length: float, levels: Sequence[int] = LEVELS
) -> Forecast:
    """What every width would bring, by requests in flight with ``length`` cached tokens each."""
    widths = [PLAIN]
    for nodes in tiers_up_to(widest.nodes):
        widths += [Width(nodes, block) for block in range(2, min(widest.block, nodes) + 1)]
    rates = {
        width: [1e3 * n * gains.tokens(width, 0.0) / cost.ms(width, n, length) for n in levels]
        for width in widths
    }
    best = [max(widths, key=lambda width, i=i: rates[width][i]) for i in range(len(levels))]  # type: ignore[misc]
    return Forecast(levels, rates, best)


def shown(found: Forecast, widest: Width) -> list[Width]:
    """The widths worth a line: plain, a few fixed ones, and whatever is best somewhere."""
    fixed = [Width(n, min(n, widest.block)) for n in (2, 3, 4, 8, 16, 32) if n <= widest.nodes]
    return [width for width in found.rates if width == PLAIN or width in fixed or width in found.best]


def costs(cost: CostTable, widest: Width, length: float) -> Table:
    view = Table(title=f"milliseconds of a target pass, {length:.0f} cached tokens a request")
    view.add_column("rows a request", justify="right")
    for level in LEVELS:
        view.add_column(f"{level} in flight", justify="right")
    for nodes in tiers_up_to(widest.nodes):
        view.add_row(str(nodes), *(f"{cost.part('target', nodes, n, length):.1f}" for n in LEVELS))
    view.add_section()
    for block in (2, widest.block):
        cells = (f"{cost.part('draft', block, n, length):.1f}" for n in LEVELS)
        view.add_row(f"drafter, block {block}", *cells)
    return view


def predictions(found: Forecast, widest: Width) -> Table:
    view = Table(title="predicted tokens/s, greedy")
    view.add_column("width")
    for level in found.levels:
        view.add_column(f"{level} in flight", justify="right")
    for width in shown(found, widest):
        name = "plain" if width == PLAIN else str(width)
        view.add_row(name, *(f"{rate:.1f}" for rate in found.rates[width]))
    view.add_section()
    plain = found.rates[PLAIN]
    view.add_row(
        "auto",
        *(
            f"{rate:.1f} ({rate / base:.2f}x, {'plain' if width == PLAIN else width})"
            for rate, base, width in zip(found.auto, plain, found.best, strict=True)
        ),
        style="bold",
    )
    return view


def plot(found: Forecast, widest: Width, title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.8), layout="constrained")
    for width in shown(found, widest):
        plain = width == PLAIN
        axes.plot(
            found.levels,
            found.rates[width],
            "--" if plain else "-",
            color="black" if plain else None,
            linewidth=1.2,
            label="plain" if plain else str(width),
        )
    axes.plot(found.levels, found.auto, "o", color="black", markersize=5, label="auto")
    axes.set_xscale("log", base=2)
    axes.set_xticks(found.levels, [str(level) for level in found.levels])
    axes.set_xlabel("requests in flight")
    axes.set_ylabel("predicted tokens/s")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: list[str]) -> int:
    parser = parser_of(__doc__, "sglang-dflash measure")
    target.add_arguments(parser)
    parser.add_argument("--length", type=int, default=256, help="cached tokens a request (%(default)s)")
    parser.add_argument("--port", type=int, help="(default: a free one)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of measure.png (%(default)s)")
    args = target.parse(parser, argv)
    if args.length < 1:
        raise UserError("--length takes a number of tokens above 0")
    port = args.port or free_port()
    require_free_port("127.0.0.1", port)
    make_dir(args.out)
    pair = target.resolve(args)
    console = Console()
    env = {**pair.env, **mode_environment("tree"), "SGLANG_DFLASH_WIDTH": "auto"}
    words = [*pair.flags["tree"], "--skip-server-warmup"]
    with (
        console.status("starting the server, which measures its steps"),
        Server(words, port=port, log=args.out / "measure.log", env=env) as server,
    ):
        marker = read_server_info(server.url).marker
    told = {} if marker is None else marker.model_dump()
    if "cost_table" not in told:
        raise UserError("the server does not choose its steps' width; run `sglang-dflash doctor`")
    file = Path(told["cost_table"])
    cost = load(CostFile.model_validate_json(file.read_bytes()).fingerprint)
    if cost is None:
        raise UserError(f"the server kept no cost table at {file}; is the cache folder writable?")
    widest = Width(told["num_nodes"], told["block_size"])
    known = read_config(pair.drafter).dflash_config
    found = forecast(cost, Gains(widest.block, known.tree_accept), widest, args.length)
    console.print(costs(cost, widest, args.length), predictions(found, widest))
    picture = args.out / "measure.png"
    plot(found, widest, f"{pair.model.name}, {args.length} cached tokens", picture)
    console.print(
        f"from {file}; delete it to measure again. Picture: {picture}", highlight=False, soft_wrap=True
    )
    return 0
