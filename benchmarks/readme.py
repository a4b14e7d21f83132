"""Put measured output into README.md and docs/benchmarks.md, after `make demo` and the benchmarks.

    python benchmarks/readme.py [--out out]

Replaces what stands between `<!-- NAME -->` and `<!-- /NAME -->` and copies the pictures. Numbers in those
blocks come from here and from nowhere else. A benchmark that was not run leaves its block as it is.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path

import changing_load
import never_pays
import serving_plot
from serving_rows import ROOT, Results, Row, machine, read_rows

from sglang_dflash.errors import UserError


def replace_block(text: str, name: str, content: str) -> str:
    """``text`` with the block ``name`` holding ``content``; raises UserError when there is no such block."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise UserError(f"the page has no block {name!r}")
    return pattern.sub(lambda match: f"{match[1]}{content.rstrip()}\n{match[2]}", text)


def picture(title: str, path: str) -> str:
    return f"![{title}]({path})"


def fill(readme: str, page: str, out: Path, images: Path) -> tuple[str, str]:
    """README.md and docs/benchmarks.md with what ``out`` holds; pictures go to ``images``."""
    demo = out / "demo.txt"
    if not demo.is_file():
        raise UserError(f"{demo} is missing; run `make demo` first")
    readme = replace_block(readme, "demo", f"```text\n{demo.read_text().rstrip()}\n```")
    readme = replace_block(readme, "machine", f"Measured on: {machine()}.")
    images.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(out / "demo.png", images / "accept_length.png")
    if rows := read_rows(out / "serving.jsonl", Row):
        results = Results(rows)
        shutil.copyfile(out / "serving.png", images / "serving.png")
        shown = picture("tokens/s and latency by requests in flight", "docs/images/serving.png")
        readme = replace_block(readme, "serving", f"{shown}\n\n{serving_plot.summary_markdown(results)}")
        page = replace_block(page, "cells", serving_plot.cells_markdown(results))
    if load := read_rows(out / "changing_load.jsonl", changing_load.LoadRow):
        shutil.copyfile(out / "changing_load.png", images / "changing_load.png")
        shown = picture("tokens/s over time while the load changes", "images/changing_load.png")
        page = replace_block(page, "load", f"{shown}\n\n{changing_load.markdown(load)}")
    if off := read_rows(out / "never_pays.jsonl", never_pays.OffRow):
        page = replace_block(page, "off", never_pays.markdown(off))
    return readme, page


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Put measured output into README.md and docs/benchmarks.md.")
    parser.add_argument("--out", type=Path, default=ROOT / "out")
    args = parser.parse_args(argv)
    pages = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
    filled = fill(*(page.read_text() for page in pages), args.out, ROOT / "docs" / "images")
    for path, text in zip(pages, filled, strict=True):
        path.write_text(text)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
