"""``sglang-dflash trace``, on steps written by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sglang_dflash.cli import trace
from sglang_dflash.errors import UserError

# The root, two nodes of the drafter's first choices, a sibling of the first, its child, and a recalled one.
TREE = [[9, -1, 1.0, False], [1, 0, 0.6, False], [2, 1, 0.4, False], [3, 0, 0.2, False], [4, 3, 0.1, False]]
TREE.append([5, 0, 0.1, True])


def step(path: list[int], width: str = "6x3") -> dict:
    return {"step": 0, "width": width, "tree": TREE, "path": path, "ms": [1.0, 2.0, 0.5]}


@pytest.mark.parametrize(
    ("path", "want"),
    [
        ([0, 1, 2], ["spine", "spine", "bonus"]),
        ([0, 3, 4], ["branch", "branch", "bonus"]),
        ([0, 5], ["recalled", "bonus"]),
        ([0], ["bonus"]),
    ],
)
def test_how_tokens_came(path: list[int], want: list[str]) -> None:
    assert trace.kinds(step(path), len(want)) == want
    assert trace.kinds(step(path), 1) == want[:1], "the answer ended among them"


def test_a_whole_answer() -> None:
    plain = {"step": 1, "width": "1x1", "tree": [[8, -1, 1.0, False]], "path": [0], "ms": []}
    said = [None, step([0, 1, 2]), None, None, plain]
    got = trace.tokens_of([9, 1, 2, 7, 8], said)
    assert got == [(9, "prefill", -1), (1, "spine", 0), (2, "spine", 0), (7, "bonus", 0), (8, "plain", 1)]
    assert trace.tokens_of([9], []) == [(9, "prefill", -1)]


def test_no_token_leaves_the_data() -> None:
    run = {"prompt": "</script><b>\u2028", "tokens": [], "steps": [], "seconds": 1.0, "counts": {}}
    page = trace.render([run], {"model": "m", "sglang": "0", "device": "cpu"})
    assert page.count("</script>") == 1
    assert "\u2028" not in page
    assert "http" not in page.replace("http-equiv", ""), "one file, nothing to fetch"
    data = re.search(r"const DATA = (.*);\n", page)
    assert data is not None
    assert json.loads(data[1])["runs"] == [run]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "nothing to ask"),
        (["hello", "--url", "http://127.0.0.1:9"], "is the server running"),
        (["hello", "--max-tokens", "0"], "--max-tokens"),
        (["--prompts", "no-such-file.jsonl"], "no-such-file.jsonl"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as raised:
        trace.main([*argv, "--out", str(tmp_path / "trace.html")])
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())
