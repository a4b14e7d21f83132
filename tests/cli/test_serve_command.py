"""What ``sglang-dflash serve`` hands to SGLang, and what it refuses before that."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_dflash.cli import serve
from sglang_dflash.client import flags
from sglang_dflash.errors import UserError
from sglang_dflash.models import pair
from sglang_dflash.models.registry import SMOLLM2


@pytest.fixture
def drafter(tmp_path: Path) -> Path:
    folder = tmp_path / "drafter"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_DFLASH_MODE", raising=False)


def test_nothing_given_serves_the_embedded_pair(drafter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair, "require_drafter", lambda path: drafter)
    words, env, embedded = serve.build_command(["--port", "31299"])
    assert embedded
    assert env == {}
    assert words[:2] == ["--model-path", str(SMOLLM2.target_dir)]
    assert words[words.index("--speculative-draft-model-path") + 1] == str(drafter)
    assert words[words.index("--speculative-algorithm") + 1] == "DFLASH"
    assert words[-2:] == ["--port", "31299"]


def test_the_modes_choose_flags_and_environment(drafter: Path) -> None:
    mine = ["--speculative-draft-model-path", str(drafter)]
    words, env, _ = serve.build_command(["--mode", "plain"])
    assert not any(word.startswith("--speculative") for word in words)
    assert env == {"SGLANG_DFLASH_MODE": None}
    words, env, _ = serve.build_command(["--mode=chain", *mine])
    assert env == {"SGLANG_DFLASH_MODE": "chain"}
    assert words.count("--speculative-draft-model-path") == 1
    words, env, _ = serve.build_command(["--mode", "tree", *mine])
    assert env == {"SGLANG_DFLASH_MODE": "tree"}


def test_the_users_words_stand_last_and_so_win(drafter: Path) -> None:
    words, _, _ = serve.build_command(
        ["--speculative-draft-model-path", str(drafter), "--served-model-name", "mine"]
    )
    assert words[-2:] == ["--served-model-name", "mine"]


def test_own_model_passes_through(drafter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, env, embedded = serve.build_command(["--model-path", "org/name", "--tp", "2"])
    assert (words, env, embedded) == (["--model-path", "org/name", "--tp", "2"], {}, False)
    assert "plain decoding" in capsys.readouterr().err
    words, _, _ = serve.build_command(["--model", "m", "--speculative-draft-model-path", str(drafter)])
    assert words[-2:] == ["--speculative-algorithm", "DFLASH"]
    words, _, _ = serve.build_command(["--model", "m", "--speculative-algorithm", "NGRAM"])
    assert words == ["--model", "m", "--speculative-algorithm", "NGRAM"]
    words, _, embedded = serve.build_command(["--config", "server.yaml"])
    assert (words, embedded) == (["--config", "server.yaml"], False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mode", "fast"], "--mode takes one of"),
        (["--mode"], "--mode takes one of"),
        (["--mode", "plain", "--speculative-algorithm", "DFLASH"], "contradict"),
        (["--mode", "tree", "--model-path", "m"], "needs a drafter"),
        (["--model-path", "m", "--speculative-draft-model-path", "/nowhere"], "no drafter at /nowhere"),
    ],
)
def test_contradictions_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        serve.build_command(words)


def test_curl_line_is_a_shell_command_with_a_json_body() -> None:
    words = shlex.split(serve.curl_line("http://127.0.0.1:30000", "a model"))
    assert words[:3] == ["curl", "-s", "http://127.0.0.1:30000/v1/chat/completions"]
    assert json.loads(words[-1])["model"] == "a model"


def test_nobody_is_let_in_from_outside_or_trusted_unasked(drafter: Path) -> None:
    """No host but loopback unless the user names one, and remote code never."""
    root = Path(__file__).resolve().parents[2]
    words, _, _ = serve.build_command(["--speculative-draft-model-path", str(drafter)])
    assert "--host" not in words  # SGLang's own default, which the running servers of the suite confirm
    assert flags.DEFAULT_HOST == "127.0.0.1"
    for folder in ("sglang_dflash", "benchmarks", "examples", "kernels"):
        for file in (root / folder).rglob("*.py"):
            text = file.read_text()
            assert "trust-remote-code" not in text, file
            assert "0.0.0.0" not in text or file.name == "serve.py", file
            for line in text.splitlines():
                assert "trust_remote_code" not in line or "=cfg.trust_remote_code" in line, f"{file}: {line}"


def test_port_in_use_is_one_line_and_no_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "sglang_dflash.cli.main", "serve", "--mode", "plain", "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"port {port} on 127.0.0.1 is in use" in done.stderr
