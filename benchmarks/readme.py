"""Put measured output into README.md: run after `make demo`, and after `make bench` where there is one.

    python benchmarks/readme.py [--out out]

Replaces what stands between `<!-- NAME -->` and `<!-- /NAME -->` and copies the demo's picture. Numbers
in the README come from here and from nowhere else.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path

import serving

from sglang_dflash.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def replace_block(text: str, name: str, content: str) -> str:
    """``text`` with the block ``name`` holding ``content``; raises UserError when there is no such block."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise UserError(f"README.md has no block {name!r}")
    return pattern.sub(lambda match: f"{match[1]}{content.rstrip()}\n{match[2]}", text)


def serving_table(rows: list[serving.Row]) -> str:
    """A Markdown table of the benchmark's rows of one setup."""
    by_key = {(row.method, row.concurrency): row for row in rows if not row.error}
    lines = [
        "| method | in flight | tokens/s | vs plain | accept length | ITL p50 / p99, ms | same as plain |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (method, level), row in sorted(
        by_key.items(), key=lambda item: (serving.METHODS.index(item[0][0]), item[0][1])
    ):
        plain = by_key.get(("plain", level))
        ratio = f"{row.tokens_per_second / plain.tokens_per_second:.2f}x" if plain else "-"
        length = f"{row.accept_length:.2f}" if row.accept_length else "-"
        itl = f"{row.itl_ms.p50:.0f} / {row.itl_ms.p99:.0f}" if row.itl_ms else "-"
        same = serving.same_share(row, by_key)
        lines.append(
            f"| {method} | {level} | {row.tokens_per_second:.1f} | {ratio} | {length} | {itl} | {same} |"
        )
    for row in rows:
        if row.error:
            lines.append(f"\n{row.method} did not run: {row.error.split(' (log:')[0]}.")
    return "\n".join(lines)


def last_setup(path: Path) -> list[serving.Row]:
    """Rows of the setup that was measured last."""
    rows = [serving.Row.model_validate_json(line) for line in path.read_text().splitlines()]
    return [row for row in rows if row.setup == rows[-1].setup]


def main() -> int:
    parser = argparse.ArgumentParser(description="Put measured output into README.md.")
    parser.add_argument("--out", type=Path, default=ROOT / "out")
    args = parser.parse_args()
    demo = args.out / "demo.txt"
    if not demo.is_file():
        raise UserError(f"{demo} is missing; run `make demo` first")
    readme = ROOT / "README.md"
    text = readme.read_text()
    text = replace_block(text, "demo", f"```text\n{demo.read_text().rstrip()}\n```")
    text = replace_block(text, "machine", f"Measured on: {serving.machine()}.")
    rows = args.out / "serving.jsonl"
    if rows.is_file():
        text = replace_block(text, "serving", serving_table(last_setup(rows)))
    images = ROOT / "docs" / "images"
    images.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(args.out / "demo.png", images / "accept_length.png")
    readme.write_text(text)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
