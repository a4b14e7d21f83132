"""The demo's arithmetic, its verdict and its picture; the whole command in `make test-full`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from sglang_dflash.cli import demo, target
from sglang_dflash.cli.plots import accept_length_by_kind
from sglang_dflash.client.chat import Prompt, Reply
from sglang_dflash.client.exact import Verdict
from sglang_dflash.client.info import ServerInfo
from sglang_dflash.errors import UserError


def make_reply(
    name: str, kind: str, ids: list[int], seconds: float, passes: int = 0, drafts: int = 0
) -> Reply:
    return Reply(name, kind, "", [1], ids, "length", seconds, 0.1, passes, drafts)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "Target"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16", "vocab_size": 10}))
    return folder


@pytest.fixture
def plan(model: Path, tmp_path: Path) -> demo.Plan:
    pair = target.Target(model, model, {"plain": [], "tree": []}, {"OMP_NUM_THREADS": "1"}, 10)
    prompts = [Prompt(id="a", kind="chat", prompt="x"), Prompt(id="b", kind="code", prompt="y")]
    return demo.Plan(pair, "tree", prompts, 4, {"plain": 31298, "tree": 31299}, tmp_path / "out")


def make_run(model: Path, replies: list[Reply]) -> demo.Run:
    info = ServerInfo(version="0.5.23", model_path=str(model), speculative_num_draft_tokens=8)
    return demo.Run(info, replies, replies, 2.0, 30.0)


def test_table_counts_tokens_over_time_and_passes(plan: demo.Plan, model: Path) -> None:
    plain = make_run(model, [make_reply("a", "chat", [1] * 10, 1.0), make_reply("b", "code", [2] * 30, 3.0)])
    tree = make_run(
        model, [make_reply("a", "chat", [1] * 10, 1.0, 4, 2), make_reply("b", "code", [2] * 30, 1.0, 8, 28)]
    )
    verdicts = [Verdict("identical"), Verdict("near-tie", 3, 5, 6, 0.125, 0.4)]
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    demo.show(plan, plain, tree, verdicts, [Verdict("identical")] * 2, console)
    text = console.export_text()
    rows = {
        line.split("│")[1].strip(): line.split("│")[2:-1]
        for line in text.splitlines()
        if line.startswith("│")
    }
    assert [cell.strip() for cell in rows["chat (1)"]] == ["10.0", "10.0", "1.00x", "1.50", "100 %"]
    assert [cell.strip() for cell in rows["code (1)"]] == ["10.0", "30.0", "3.00x", "4.50", "0 %"]
    # All: 40 tokens in 4 s against 40 in 2 s; 30 drafts in 12 passes.
    first, second = [line for line in text.splitlines() if line.startswith("│ all (2)")]
    assert [cell.strip() for cell in first.split("│")[2:-1]] == ["10.0", "20.0", "2.00x", "3.50", "50 %"]
    # Eight in flight: 40 tokens in 2 s of both.
    assert [cell.strip() for cell in second.split("│")[2:-1]] == ["20.0", "20.0", "1.00x", "3.50", "100 %"]
    assert "b: near-tie at token 3: plain 5, other 6, logit gap 0.125" in text
    assert "exact: yes" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_equal_outputs_start_no_server(plan: demo.Plan, model: Path) -> None:
    run = make_run(model, [make_reply("a", "chat", [1], 1.0)])
    nobody = "http://127.0.0.1:1"
    assert demo.compare(plan, run, run.replies, run.crowd, nobody, Progress()) == [Verdict("identical")]


def test_a_demo_of_the_wrong_worker_is_refused() -> None:
    base = {"version": "0.5.23", "model_path": "m"}
    chain = {"dflash": {"plugin": "1", "mode": "chain", "worker": "w"}}
    demo.check_worker(ServerInfo.model_validate(base), "plain")
    with pytest.raises(UserError, match="no marker"):
        demo.check_worker(ServerInfo.model_validate(base), "tree")
    with pytest.raises(UserError, match="mode chain"):
        demo.check_worker(ServerInfo.model_validate({**base, "internal_states": [chain]}), "tree")
    demo.check_worker(ServerInfo.model_validate({**base, "internal_states": [chain]}), "chain")


@pytest.mark.parametrize(
    ("asked", "in_config", "used"),
    [
        ("auto", "bfloat16", "bfloat16"),
        ("auto", "float32", "float16"),
        ("float32", "bfloat16", "float32"),
        ("float", "bfloat16", "float32"),
        ("half", "bfloat16", "float16"),
    ],
)
def test_dtype_is_what_sglang_computes_in(asked: str, in_config: str, used: str, model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"dtype": in_config}))
    info = ServerInfo(version="0.5.23", model_path=str(model), dtype=asked)
    assert demo.resolve_dtype(info) == used


def test_picture_and_data_are_written(plan: demo.Plan, model: Path) -> None:
    replies = [make_reply("a", "chat", [1, 2], 1.0, 2, 3), make_reply("b", "code", [1, 2], 1.0, 2, 5)]
    run = make_run(model, replies)
    picture, data = demo.write(plan, run, run, [Verdict("identical")] * 2)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    content = json.loads(data.read_text())
    assert content["tree"][1]["correct_drafts"] == 5
    accept_length_by_kind(replies[:1], "one kind", plan.out / "other.png")
    assert (plan.out / "other.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.timeout(1200)
def test_the_whole_demo(tmp_path: Path) -> None:
    """Two servers at once: the command as a user runs it, outputs exact, a line per stage in a pipe."""
    command = [sys.executable, "-m", "sglang_dflash.cli.main", "demo", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--prompts", "2", "--max-tokens", "32"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "exact: yes" in done.stdout
    assert "starting the plain and the tree server" in done.stdout
    assert "tokens/s, 8 in flight" in done.stdout
    content = json.loads((tmp_path / "demo.json").read_text())
    assert len(content["tree"]) == 4
    assert all(reply["verify_passes"] > 0 for reply in content["tree"])
    assert (tmp_path / "demo.png").exists()
