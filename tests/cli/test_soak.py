"""The soak's judgement: it must notice what it is there to notice."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import soak  # noqa: E402
import soak_load  # noqa: E402

from sglang_dflash.client.chat import Prompt  # noqa: E402

TASK = soak_load.Task(0, "greedy", "Bakimoru", (1, 2), {"temperature": 0, "max_new_tokens": 4})
STOP = {"type": "length", "length": 4}
WANT = soak_load.Answer([5, 6, 7, 8], "a b c d", STOP, 4, 2, [-0.1, -0.2, -0.3, -0.4])


def test_plain_decodings_answer_is_right() -> None:
    assert soak_load.differences(TASK, WANT, WANT) == []
    assert soak_load.differences(TASK, replace(WANT, passes=4), WANT) == []
    broken_off = replace(WANT, ids=[5, 6], text="a b", finish=None, tokens=2, whole=False)
    assert soak_load.differences(TASK, broken_off, WANT) == []
    in_the_last_step = replace(WANT, ids=[5, 6, 7, 8, 9], tokens=5, whole=False)
    assert soak_load.differences(TASK, in_the_last_step, WANT) == []
    assert soak_load.differences(TASK, replace(WANT, ids=[9, 9, 9, 9]), None) == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"ids": [5, 6, 7, 9]}, "tokens differ"),
        ({"ids": [5, 6, 7]}, "usage says 4"),
        ({"ids": [5, 6, 7, 8, 9], "tokens": 5}, "at most 4"),
        ({"text": "a b c"}, "text or finish"),
        ({"finish": {"type": "stop"}}, "text or finish"),
        ({"logprobs": [-0.1, -0.2, -0.3, -0.5]}, "log-probability differs"),
        ({"logprobs": []}, "0 log-probabilities"),
        ({"orderly": False}, "took back"),
        ({"ids": [5, 7], "whole": False}, "no prefix"),
    ],
)
def test_anything_else_is_wrong(change: dict, word: str) -> None:
    assert any(word in line for line in soak_load.differences(TASK, replace(WANT, **change), WANT))


def test_another_requests_word_is_seen() -> None:
    words = ["Bakimoru", "Zotelupi"]
    assert soak_load.strangers(replace(WANT, text="my word is bakimoru"), TASK, words) == []
    assert soak_load.strangers(replace(WANT, text="it was ZOTELUPI"), TASK, words) == ["Zotelupi"]


def test_every_kind_is_asked_with_its_own_word() -> None:
    tokenizer = SimpleNamespace(
        apply_chat_template=lambda messages, **_: list(messages[0]["content"].encode())
    )
    prompts = [Prompt(id=str(n), kind="chat", prompt=f"prompt {n}") for n in range(5)]
    count = 2 * len(soak_load.KINDS)
    tasks = soak_load.make_tasks(tokenizer, prompts, count, seed=3)
    assert Counter(task.kind for task in tasks) == dict.fromkeys(soak_load.KINDS, 2)
    texts = [bytes(task.ids).decode() for task in tasks]
    for task in tasks:
        assert [task.word in text for text in texts].count(True) == 1
    assert tasks == soak_load.make_tasks(tokenizer, prompts, count, seed=3)
    assert [task.kind for task in tasks if not task.exact] == ["unseeded", "unseeded"]


def test_leaks_and_log_lines() -> None:
    start = {"kv_slots": 100.0, "request_rows": 8.0, "rss_mb": 1000.0}
    assert soak.leaks(start, 1500.0, start | {"rss_mb": 1700.0}) == []
    assert "99 at the end" in soak.leaks(start, 1500.0, start | {"kv_slots": 99.0})[0]
    assert "7 at the end" in soak.leaks(start, 1500.0, start | {"request_rows": 7.0})[0]
    assert "memory grew by 300 MB" in soak.leaks(start, 1500.0, start | {"rss_mb": 1800.0})[0]
    log = (
        "[2026-01-01 00:00:00,000] INFO root: no ERROR here\n[2026-01-01 00:00:00,000] ERROR root: bad\n"
        "Traceback (most recent call last):\n"
    )
    assert len(soak.bad_lines(log)) == 2


def test_the_report_says_what_was_wrong() -> None:
    report = soak.Report("now", "a machine", 3, 17, Counter(whole=3, abort=1), Counter(greedy=4), tokens=40)
    assert not report.wrong
    assert "| requests | 4 |" in soak.markdown(report)
    assert "Wrong" not in soak.markdown(report)
    assert json.loads(json.dumps(vars(report)))["requests"] == {"whole": 3, "abort": 1}
    report.mismatches, report.shown = 1, ["greedy: tokens differ"]
    assert report.wrong
    assert "- greedy: tokens differ" in soak.markdown(report)
