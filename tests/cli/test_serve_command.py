"""What ``sglang-dflash serve`` hands to SGLang, and what it refuses before that."""

from __future__ import annotations

import argparse
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


def config(folder: Path, **options: object) -> str:
    file = folder / "server.yaml"
    lines = [f"{name.replace('_', '-')}: {json.dumps(value)}\n" for name, value in options.items()]
    file.write_text("".join(lines))
    return str(file)


def sglang_reads(argv: list[str]) -> argparse.Namespace:
    """What SGLang's launcher makes of a command line, ``prepare_server_args`` up to its parser."""
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return parser.parse_args(ConfigArgumentMerger(parser).merge_config_with_args(argv))


def test_a_drafter_in_the_config_file_serves_trees(drafter: Path, tmp_path: Path) -> None:
    file = config(tmp_path, model_path="m", speculative_draft_model_path=str(drafter), port=8000)
    for more in ([], ["--mode", "tree"], ["--mode", "chain"]):
        words, _, embedded = serve.build_command(["--config", file, *more])
        assert not embedded
        assert sglang_reads(words).speculative_algorithm == "DFLASH"
    words, _, _ = serve.build_command([f"--config={file}"])
    assert sglang_reads(words).port == 8000
    with pytest.raises(UserError, match="contradict"):
        serve.build_command(["--config", file, "--mode", "plain"])
    file = config(tmp_path, model="m", speculative_algo="NGRAM")
    assert serve.build_command(["--config", file])[0] == ["--config", file]
    with pytest.raises(UserError, match="needs a drafter"):
        serve.build_command(["--config", config(tmp_path, model="m"), "--mode", "tree"])


def test_a_config_file_without_a_model_changes_the_embedded_pair(
    drafter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair, "require_drafter", lambda path: drafter)
    file = config(tmp_path, max_total_tokens=4096, sleep_on_idle=False, served_model_name="mine", port=8000)
    words, _, embedded = serve.build_command(["--config", file, "--port", "8001"])
    read = sglang_reads(words)
    assert embedded
    assert read.model_path == str(SMOLLM2.target_dir)
    assert (read.speculative_algorithm, read.speculative_draft_model_path) == ("DFLASH", str(drafter))
    assert (read.max_total_tokens, read.sleep_on_idle, read.served_model_name) == (4096, False, "mine")
    assert read.port == flags.port_of(flags.with_config(words)) == 8001


def test_the_announcer_reads_the_config_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Port, host and name come from the file: the free port is looked for and announced there."""
    seen: list[object] = []
    monkeypatch.setattr(serve, "require_free_port", lambda *where: seen.append(where))
    monkeypatch.setattr(serve, "_watch", lambda *what: seen.append(what))
    monkeypatch.setattr(serve.os, "execv", lambda *command: None)
    file = config(tmp_path, model_path="m", port=8000, host="0.0.0.0", served_model_name="mine")
    serve.main(["--config", file])
    url = "http://127.0.0.1:8000"
    assert seen == [("0.0.0.0", 8000), (url, serve.curl_line(url, "mine"))]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.yaml", None, "cannot be read: No such file"),
        ("c.json", "{}", "named .yaml or .yml"),
        ("c.yaml", "a: [", "line 1 is not YAML"),
        ("c.yaml", "- port", "is not a table"),
        ("c.yaml", "port: http", "'http' is not a number"),
        ("c.yaml", "model_path: m", "write model-path, as in the flag, not model_path"),
    ],
)
def test_a_config_file_that_cannot_be_used_is_one_line(
    tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        flags.port_of(flags.with_config(["--config", str(tmp_path / name)]))


def test_curl_line_is_a_shell_command_with_a_json_body() -> None:
    words = shlex.split(serve.curl_line("http://127.0.0.1:30000", "a model"))
    assert words[:3] == ["curl", "-s", "http://127.0.0.1:30000/v1/chat/completions"]
    assert json.loads(words[-1])["model"] == "a model"


def test_the_announcer_of_a_server_with_a_key_and_tls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks over https, and its line sends the key, which it does not print."""
    seen: list[str] = []
    monkeypatch.setattr(serve, "require_free_port", lambda *where: None)
    monkeypatch.setattr(serve, "_watch", lambda *what: seen.extend(what))
    monkeypatch.setattr(serve.os, "execv", lambda *command: None)
    keyed = ["--model-path", "m", "--api-key", "s3cret", "--ssl-keyfile", "k.pem", "--ssl-certfile", "c.pem"]
    serve.main(keyed)
    url, line = seen
    assert url == "https://127.0.0.1:30000"
    assert "s3cret" not in line
    shown = subprocess.run(
        ["bash", "-c", f"curl() {{ printf '%s\\n' \"$@\"; }}; {line}"],
        capture_output=True,
        text=True,
        check=True,
        env={"SGLANG_API_KEY": "s3cret"},
    ).stdout.splitlines()
    assert "Authorization: Bearer s3cret" in shown
    assert "-k" in shown
    assert f"{url}/v1/chat/completions" in shown


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
                # Passed on as the user said it, or named as a parameter that SGLang must have.
                fine = "=cfg.trust_remote_code" in line or '"trust_remote_code"' in line
                assert "trust_remote_code" not in line or fine, f"{file}: {line}"


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
