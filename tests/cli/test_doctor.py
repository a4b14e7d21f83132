"""Each finding of ``sglang-dflash doctor``, provoked."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from sglang_dflash.cli import findings
from sglang_dflash.client import memory
from sglang_dflash.errors import UserError
from sglang_dflash.models.registry import SMOLLM2


def bad(found: Iterator[findings.Finding]) -> list[findings.Finding]:
    return [finding for finding in found if not finding.ok]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SGLANG_PLUGINS", "SGLANG_PLATFORM", "SGLANG_USE_CPU_ENGINE", "SGLANG_DFLASH_MODE"):
        monkeypatch.delenv(name, raising=False)


def test_this_installation_is_visible_to_sglang() -> None:
    assert bad(findings.sglang_version()) == []
    assert bad(findings.entry_points_visible()) == []


def test_another_sglang_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "version", lambda name: "0.5.16")
    (finding,) = bad(findings.sglang_version())
    assert "0.5.16 is installed" in finding.text
    assert "install" in finding.mend


def test_a_clean_environment_has_no_findings() -> None:
    assert bad(findings.environment(lambda: False)) == []


@pytest.mark.parametrize(
    ("variables", "accelerator", "expected"),
    [
        ({"SGLANG_PLUGINS": "dflash_cpu"}, False, ["leaves out dflash_tree"]),
        ({"SGLANG_PLUGINS": "dflash_tree"}, False, ["leaves out dflash_cpu"]),
        ({"SGLANG_PLUGINS": "dflash_tree"}, True, []),
        ({"SGLANG_PLUGINS": "dflash_tree, dflash_cpu"}, False, []),
        ({"SGLANG_PLATFORM": "ascend"}, True, ["dflash_tree is not loaded"]),
        ({"SGLANG_PLATFORM": "dflash_cpu"}, False, []),
        ({"SGLANG_PLATFORM": "dflash_cpu"}, True, ["has an accelerator"]),
        ({"SGLANG_USE_CPU_ENGINE": "1"}, False, ["own CPU engine"]),
    ],
)
def test_environment_findings(
    variables: dict[str, str], accelerator: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = bad(findings.environment(lambda: accelerator))
    assert len(found) == len(expected)
    for finding, part in zip(found, expected, strict=True):
        assert part in finding.text
        assert finding.mend


def test_wrong_settings_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_DFLASH_TOPK", "4")
    assert "SGLANG_DFLASH_TOP_K" in bad(findings.settings())[0].text
    monkeypatch.delenv("SGLANG_DFLASH_TOPK")
    monkeypatch.setenv("SGLANG_DFLASH_MODE", "chain")
    assert "off-switch" in bad(findings.settings())[0].text
    monkeypatch.delenv("SGLANG_DFLASH_MODE")
    assert bad(findings.settings()) == []


def test_memory_is_named(tmp_path: Path) -> None:
    (finding,) = findings.free_memory(int(9.5e9))
    assert finding.ok
    assert finding.text == "9.5 GB free; serve takes 4 GB, demo takes 8 GB, make test takes 15 GB"
    (finding,) = bad(findings.free_memory(int(2e9)))
    assert "--max-total-tokens" in finding.mend
    assert list(findings.free_memory(None)) == []


def test_free_memory_is_the_containers_where_that_is_less(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    assert memory.available(tmp_path) is None
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    assert memory.available(tmp_path) == 8000 * 1024
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    for name, value in {"current": "3000000", "stat": "anon 1\ninactive_file 500000", "max": "max"}.items():
        (group / f"memory.{name}").write_text(f"{value}\n")
    assert memory.available(tmp_path) == 8000 * 1024
    (group / "memory.max").write_text("4000000\n")
    assert memory.available(tmp_path) == 1_500_000


def test_a_missing_target_says_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_DFLASH_CACHE", str(tmp_path))
    found = bad(findings.embedded_pair(replace(SMOLLM2, bytes_needed=1 << 60)))
    assert found[0].mend == "run `sglang-dflash fetch smollm2`"
    assert found[1].what == "disk"


def test_a_missing_drafter_is_found() -> None:
    (finding,) = bad(findings.drafter(replace(SMOLLM2, drafter="none"), True))
    assert "is missing" in finding.text


class _Handler(BaseHTTPRequestHandler):
    content = b"{}"

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def answering() -> Iterator[Callable[[dict], int]]:
    """``answering(info)`` starts a server whose every answer is ``info`` and returns its port."""
    servers: list[HTTPServer] = []

    def start(info: dict) -> int:
        handler = type("Handler", (_Handler,), {"content": json.dumps(info).encode()})
        server = HTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return int(server.server_address[1])

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


BASE = {"version": "0.5.23", "model_path": "m", "device": "cpu"}


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({}, "no speculative decoding"),
        ({"speculative_algorithm": "NGRAM"}, "not ours"),
        ({"speculative_algorithm": "DFLASH", "internal_states": [{}]}, "built-in chain serves"),
        (
            {
                "speculative_algorithm": "DFLASH",
                "internal_states": [{"dflash": {"plugin": "1", "mode": "chain", "worker": "w"}}],
            },
            "chain: w",
        ),
        (
            {
                "speculative_algorithm": "DFLASH",
                "internal_states": [
                    {
                        "dflash": {
                            "plugin": "1",
                            "mode": "chain",
                            "worker": "w",
                            "reason": "LoRA adapters",
                            "way_out": "leave out --enable-lora",
                        }
                    }
                ],
            },
            "chain: w, because trees do not serve LoRA adapters",
        ),
        (
            {
                "internal_states": [
                    {
                        "dflash": {
                            "plugin": "1",
                            "mode": "plain",
                            "worker": "w",
                            "reason": "a drafter window",
                            "way_out": "leave it out",
                        }
                    }
                ],
            },
            "plain: w, because trees do not serve a drafter window",
        ),
    ],
)
def test_a_running_server_without_trees_is_found(
    info: dict, expected: str, answering: Callable[[dict], int]
) -> None:
    (finding,) = bad(findings.running_server(f"127.0.0.1:{answering({**BASE, **info})}"))
    assert expected in finding.text


def test_a_running_server_with_trees_is_well(answering: Callable[[dict], int]) -> None:
    marker = {"plugin": "1", "mode": "tree", "worker": "w", "nodes": 32}
    states = [{"dflash": marker, "avg_spec_accept_length": 2.5}]
    port = answering({**BASE, "speculative_algorithm": "DFLASH", "internal_states": states})
    found = list(findings.running_server(f"http://127.0.0.1:{port}/v1"))
    assert bad(iter(found)) == []
    assert "nodes=32" in found[1].text
    assert "2.50" in found[2].text
    assert bad(findings.port("127.0.0.1", port)) == []


def test_a_port_of_something_else_is_found(answering: Callable[[dict], int]) -> None:
    port = answering({"hello": "world"})
    assert "not by SGLang" in bad(findings.port("127.0.0.1", port))[0].text
    with pytest.raises(UserError, match="is this an SGLang server"):
        list(findings.running_server(f"127.0.0.1:{port}"))


def test_doctor_ends_with_a_count_and_code_one() -> None:
    """The whole command, with SGLang's own plugin loading, in an environment that is wrong twice."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        listener.close()
    done = subprocess.run(
        [sys.executable, "-m", "sglang_dflash.cli.main", "doctor", "--port", str(port)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "SGLANG_PLUGINS": "dflash_cpu"},
    )
    assert done.returncode == 1
    assert "BAD  SGLANG_PLUGINS" in done.stdout
    assert "BAD  hooks: not in force on create_worker" in done.stdout
    assert done.stderr.strip().endswith("to mend")
