"""A server that was started with ``--api-key``, asked by everything that asks a server."""

from __future__ import annotations

import http.server
import json
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sglang_dflash.cli import doctor, evaluate, findings, target, top
from sglang_dflash.client.chat import connect
from sglang_dflash.client.exact import ServerOracle
from sglang_dflash.client.info import read_server_info
from sglang_dflash.errors import UserError
from sglang_dflash.train import served
from tests.cli.test_top import text

KEY = "s3cret"
MARKER = {"plugin": "1", "mode": "tree", "worker": "w", "block_size": 8, "num_nodes": 16}
INFO = {
    "version": "0.5.23",
    "model_path": "m",
    "device": "cpu",
    "speculative_algorithm": "DFLASH",
    "internal_states": [{"dflash": MARKER}],
}


class _Locked(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = text((4, 2, 2)) if self.path == "/metrics" else json.dumps(INFO)
        self._answer(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(json.dumps({"output_ids": [1, 2, 3], "meta_info": {"spec_verify_ct": 1}}))

    def _answer(self, body: str) -> None:
        allowed = self.headers.get("Authorization") == f"Bearer {KEY}"
        self.send_response(200 if allowed else 401)
        self.end_headers()
        self.wfile.write(body.encode() if allowed else b'{"error":"Unauthorized"}')

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Locked) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_API_KEY", raising=False)


DOCUMENT = SimpleNamespace(
    tokens=torch.tensor([5, 1, 2, 3]), prompt_len=1, family="chat", temperature=0.0, kind="chat"
)
ASK: dict[str, Callable[..., object]] = {
    "doctor": lambda url, *words: doctor.main(["--url", url, *words]),
    "top": lambda url, *words: top.main(["--url", url, "--once", *words]),
    "eval": lambda url, *words: served.run(url, [DOCUMENT], 16, *words[1:]).answers - 1,
}


@pytest.mark.parametrize("tool", ASK)
def test_a_key_is_asked_for_and_sent(tool: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"wants an API key; pass --api-key or set SGLANG_API_KEY"):
        ASK[tool](url)
    with pytest.raises(UserError, match="does not take this API key"):
        ASK[tool](url, "--api-key", "another")
    assert ASK[tool](url, "--api-key", KEY) == 0
    monkeypatch.setenv("SGLANG_API_KEY", KEY)
    assert ASK[tool](url) == 0


def test_eval_takes_the_option() -> None:
    assert evaluate.EvalOptions(api_key=KEY).api_key == KEY


def test_a_locked_server_is_no_stranger_on_the_port(url: str) -> None:
    (finding,) = findings.port("127.0.0.1", int(url.rpartition(":")[2]))
    assert finding.ok
    assert "wants an API key" in finding.text


def test_a_key_for_the_servers_of_the_demo_reaches_its_clients(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_API_KEY", "the user's own")
    (tmp_path / "config.json").write_text('{"vocab_size": 9}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    target.resolve(Namespace(model_path=tmp_path, drafter=tmp_path, sglang=["--api-key", KEY]))
    assert read_server_info(url).version == "0.5.23"
    assert connect(url).api_key == KEY
    assert ServerOracle(url, 9)._generate([1], 1, 1)["output_ids"] == [1, 2, 3]
