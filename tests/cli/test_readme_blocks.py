"""Measured blocks of README.md and docs/benchmarks.md exist, are filled, and are replaced whole."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from sglang_dflash.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import changing_load  # noqa: E402
import never_pays  # noqa: E402
import readme  # noqa: E402
from serving_plot import cells_markdown, summary_markdown  # noqa: E402
from serving_rows import Percentiles, Results, Row, append  # noqa: E402

BLOCKS = {"README.md": ("demo", "machine", "serving"), "docs/benchmarks.md": ("cells", "load", "off")}


def test_a_block_is_replaced_and_nothing_else() -> None:
    text = "a\n<!-- x -->\nold\nold\n<!-- /x -->\nb\n"
    assert readme.replace_block(text, "x", r"new \1") == "a\n<!-- x -->\nnew \\1\n<!-- /x -->\nb\n"
    with pytest.raises(UserError, match="no block 'y'"):
        readme.replace_block(text, "y", "new")


def rows() -> list[Row]:
    latency = Percentiles(p50=80, p90=100, p99=200)
    rates = {"plain": (20.0, 20.0, 40.0), "4x4": (24.0, 26.0, 50.0), "auto": (30.0, 28.0, 54.0)}
    return [
        Row(
            setup="s",
            run="r",
            round=number,
            method=method,
            concurrency=1,
            tokens_per_second=rate,
            accept_length=None if method == "plain" else 2.5,
            itl_ms=latency,
            outputs={"x": "1"},
            widths={"8x6": 1.0} if method == "auto" else None,
            machine="a machine",
            threads="1",
            sglang="0.5.23",
        )
        for method, all_of in rates.items()
        for number, rate in enumerate(all_of)
    ]


def test_tables_have_paired_ratios() -> None:
    results = Results(rows())
    lines = summary_markdown(results).splitlines()
    assert lines[0] == "| in flight | plain, tokens/s | 4x4 | auto | auto / best of the others |"
    assert lines[2] == "| 1 | 20.0 | 1.25x | **1.40x** | 1.08, 1.08 to 1.25 (4x4) |"
    assert "a machine, 1 thread a server, SGLang 0.5.23, greedy, 3 rounds" in lines[-1]
    cells = cells_markdown(results).splitlines()
    assert cells[2] == "| 1 | plain | 20.0 | 1.00x | 1.00 to 1.00 | - | - | 80 / 200 | 100 % |  |"
    assert cells[-1] == "| 1 | auto | 30.0 | 1.40x | 1.35 to 1.50 | 2.50 | - | 80 / 200 | 100 % | 8x6 100 % |"


def test_what_was_measured_goes_into_both_pages(tmp_path: Path) -> None:
    pages = [(ROOT / name).read_text() for name in BLOCKS]
    out, images = tmp_path / "out", tmp_path / "images"
    out.mkdir()
    with pytest.raises(UserError, match="run `make demo` first"):
        readme.fill(*pages, out, images)
    (out / "demo.txt").write_text("a table\n")
    (out / "demo.png").write_bytes(b"demo")
    first, second = readme.fill(*pages, out, images)
    assert "```text\na table\n```" in first
    assert second == pages[1], "what was not measured stays"
    for row in rows():
        append(out / "serving.jsonl", row)
    for name in ("serving", "changing_load"):
        (out / f"{name}.png").write_bytes(name.encode())
    common = {"setup": "s", "run": "r", "round": 0, "machine": "m"}
    for method in never_pays.METHODS:
        append(out / "changing_load.jsonl", changing_load.LoadRow(method=method, tokens=[[8]] * 4, **common))
        off = never_pays.OffRow(method=method, kind="noise", concurrency=16, tokens=9, seconds=3, **common)
        append(out / "never_pays.jsonl", off)
    first, second = readme.fill(*pages, out, images)
    assert "![tokens/s and latency by requests in flight](docs/images/serving.png)" in first
    assert "| 1 | 20.0 | 1.25x | **1.40x** |" in first
    for text in (
        "| 1 | auto | 30.0 |",
        "(images/changing_load.png)",
        "| both, 1 in flight | 8.0 |",
        "| noise | 16 |",
    ):
        assert text in second
    assert (images / "serving.png").read_bytes() == b"serving"
    assert (images / "changing_load.png").read_bytes() == b"changing_load"


@pytest.mark.parametrize("page", BLOCKS)
def test_links_and_blocks_hold(page: str) -> None:
    text = (ROOT / page).read_text()
    for name in BLOCKS[page]:
        block = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
        assert block is not None
        assert block[1].strip()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / link).exists(), link
