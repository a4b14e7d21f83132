"""README.md's measured blocks exist, are filled, and are replaced whole."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from sglang_dflash.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import readme  # noqa: E402
import serving  # noqa: E402


def test_a_block_is_replaced_and_nothing_else() -> None:
    text = "a\n<!-- x -->\nold\nold\n<!-- /x -->\nb\n"
    assert readme.replace_block(text, "x", r"new \1") == "a\n<!-- x -->\nnew \\1\n<!-- /x -->\nb\n"
    with pytest.raises(UserError, match="no block 'y'"):
        readme.replace_block(text, "y", "new")


def test_serving_table_has_ratios_and_reasons() -> None:
    rows = [
        serving.Row(setup="s", method="tree", concurrency=1, tokens_per_second=30.0, accept_length=2.5),
        serving.Row(setup="s", method="plain", concurrency=1, tokens_per_second=20.0),
        serving.Row(setup="s", method="ngram", concurrency=0, error="no library (log: here)"),
    ]
    lines = readme.serving_table(rows).splitlines()
    assert lines[2].startswith("| plain | 1 | 20.0 | 1.00x | - |")
    assert lines[3].startswith("| tree | 1 | 30.0 | 1.50x | 2.50 |")
    assert lines[-1] == "ngram did not run: no library."


def test_readme_links_and_blocks_hold() -> None:
    text = (ROOT / "README.md").read_text()
    for name in ("demo", "machine", "serving"):
        block = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
        assert block is not None
        assert block[1].strip()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link
