"""Prompts, replies, flags, ports and a server process's end, without SGLang."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sglang_dflash.cli.main import main
from sglang_dflash.client import flags, server
from sglang_dflash.client.chat import Reply, inter_token_gaps, mean_accept_length, read_prompts
from sglang_dflash.client.fast_start import disabled_models
from sglang_dflash.client.info import ServerInfo, normalize_url, read_server_info
from sglang_dflash.client.ports import free_port, port_is_free, require_free_port
from sglang_dflash.client.server import cause_of_death
from sglang_dflash.errors import UserError
from sglang_dflash.models.prompts import pick, prompts_file
from tests.server import conftest as server_conftest
from tests.server import support


def reply(kind: str = "chat", passes: int = 0, drafts: int = 0, tokens: int = 4) -> Reply:
    return Reply("x", kind, "", [1], list(range(tokens)), "stop", 2.0, 0.5, passes, drafts)


def test_shipped_prompts_are_many_diverse_and_unique() -> None:
    prompts = read_prompts(prompts_file())
    for kind in ("chat", "code"):
        assert sum(prompt.kind == kind for prompt in prompts) >= 60
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    assert len({prompt.prompt.casefold() for prompt in prompts}) == len(prompts)


def test_picked_prompts_are_the_same_every_time_and_of_every_kind() -> None:
    prompts = read_prompts(prompts_file())
    chosen = pick(prompts, 3)
    assert [prompt.kind for prompt in chosen] == ["chat"] * 3 + ["code"] * 3
    assert chosen == pick(prompts, 3)
    assert len(pick(prompts, 10_000)) == len(prompts)


def test_a_bad_prompt_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"id": "a", "kind": "chat", "prompt": "x"}\n{"id": "b", "kind": "poem", "prompt": "x"}\n'
    )
    with pytest.raises(UserError, match="line 2"):
        read_prompts(path)
    path.write_text("")
    with pytest.raises(UserError, match="holds no prompts"):
        read_prompts(path)
    with pytest.raises(UserError, match="cannot read"):
        read_prompts(tmp_path / "missing.jsonl")


def test_accept_length_counts_passes_not_replies() -> None:
    # 30 drafts in 10 passes and 0 in 10: 1.5 + 1 per pass, not the mean of 4 and 1.
    assert mean_accept_length([reply(passes=10, drafts=30), reply(passes=10)]) == pytest.approx(2.5)
    assert mean_accept_length([reply(), reply()]) is None
    assert reply(passes=4, drafts=6).accept_length == pytest.approx(2.5)


def test_inter_token_gaps_share_a_chunks_time_among_its_tokens() -> None:
    gaps = inter_token_gaps([(0.5, 1), (0.9, 5), (1.0, 6)])
    assert gaps == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.1])
    assert inter_token_gaps([(0.5, 1)]) == []


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--port", "8000"], "8000"),
        (["--port=8000"], "8000"),
        (["--port", "1", "--port", "2"], "2"),
        (["--other", "8000"], None),
        ([], None),
    ],
)
def test_flag_value(words: list[str], value: str | None) -> None:
    assert flags.flag_value(words, flags.PORT) == value


def test_flag_without_a_value_is_an_error() -> None:
    with pytest.raises(UserError, match="needs a value"):
        flags.flag_value(["--port"], flags.PORT)
    with pytest.raises(UserError, match="needs a value"):
        flags.flag_value(["--port", "--host"], flags.PORT)
    with pytest.raises(UserError, match="not a number"):
        flags.port_of(["--port", "http"])


def test_a_listening_port_is_not_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not port_is_free("127.0.0.1", port)
        with pytest.raises(UserError, match=f"port {port} on 127.0.0.1 is in use"):
            require_free_port("127.0.0.1", port)
    assert port_is_free("127.0.0.1", port)
    require_free_port("127.0.0.1", free_port())
    with pytest.raises(UserError, match="not a port"):
        require_free_port("127.0.0.1", 70000)
    with pytest.raises(UserError, match="cannot listen on"):
        require_free_port("192.0.2.1", port)
    with pytest.raises(UserError, match="cannot listen on"):
        require_free_port("no.such.host.invalid", port)


def test_urls_are_normalized() -> None:
    assert normalize_url("localhost:30000") == "http://localhost:30000"
    assert normalize_url("http://localhost:30000/v1/") == "http://localhost:30000"


def test_no_server_is_one_line() -> None:
    with pytest.raises(UserError, match="is the server running"):
        read_server_info(f"http://127.0.0.1:{free_port()}", timeout=2.0)


def test_server_info_reads_the_marker() -> None:
    state = {
        "avg_spec_accept_length": 2.5,
        "dflash": {"plugin": "1", "mode": "tree", "worker": "w", "nodes": 32},
    }
    info = ServerInfo.model_validate({"version": "0.5.23", "model_path": "m", "internal_states": [state]})
    assert info.marker is not None
    assert info.marker.mode == "tree"
    assert info.accept_length == 2.5
    bare = ServerInfo.model_validate({"version": "0.5.23", "model_path": "m", "internal_states": [{}]})
    assert bare.marker is None
    assert bare.accept_length is None


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (
            "x\nsglang-dflash: the drafter has no config\nTraceback\nSystemExit: 1\n",
            "the drafter has no config",
        ),
        ("Traceback\n  File\nValueError: bad flag\nkill_process_tree called\n", "ValueError: bad flag"),
        (
            "usage: x\nlaunch_server.py: error: unrecognized arguments: --foo\n",
            "launch_server.py: error: unrecognized arguments: --foo",
        ),
        ("ImportError: \n\n[kernel] no library\nmore\n", "ImportError: [kernel] no library"),
        ("", "it wrote nothing"),
    ],
)
def test_cause_of_death_is_the_line_that_says_why(log: str, cause: str) -> None:
    assert cause_of_death(log) == cause


def test_a_server_keeps_the_modules_that_it_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the shell says: else each of its processes compiles SGLang and torch anew."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(server, "LAUNCH", [sys.executable, "-c", "import sys; print(sys.flags)"])
    one = server.Server([], port=free_port(), log=tmp_path / "log")
    with pytest.raises(UserError, match="did not start"):
        one.__enter__()
    assert "dont_write_bytecode=0" in one.output()
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert main(["serve", "--help"]) == 0
    assert "PYTHONDONTWRITEBYTECODE" not in os.environ
    assert not sys.dont_write_bytecode


def test_a_dead_server_of_a_failed_test_is_named_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "wait_ready", lambda *_: True)
    monkeypatch.setattr(server, "LAUNCH", ["bash", "-c", "seq 50; kill -9 $$"])
    monkeypatch.setattr(support, "RUNNING", [])
    with server.Server([], port=free_port(), log=tmp_path / "31000-tree.log") as one:
        one._process.wait()  # type: ignore[union-attr]
        support.RUNNING.append(one)
        report = SimpleNamespace(failed=True, sections=[])
        monkeypatch.setattr(server_conftest, "RUNNING", support.RUNNING)
        hook = server_conftest.pytest_runtest_makereport(None, None)  # type: ignore[arg-type]
        next(hook)
        with pytest.raises(StopIteration):
            hook.send(report)
    ((title, end),) = report.sections
    assert "the server 31000-tree died" in title
    assert end.splitlines()[-1] == "50"
    assert len(end.splitlines()) == 25


def test_fast_start_leaves_the_kept_families() -> None:
    names = disabled_models(["llama", "dflash"]).split(",")
    assert len(names) > 50
    assert "llama" not in names
    assert "dflash" not in names
    assert "qwen3" in names
