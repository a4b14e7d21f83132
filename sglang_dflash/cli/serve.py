"""``sglang-dflash serve``: start an SGLang server with draft trees; any SGLang flag passes through.

With no --model-path it serves the embedded pair (SmolLM2-135M-Instruct and its drafter), fetching the
target first where needed. With your own model give both halves: --model-path TARGET
--speculative-draft-model-path DRAFTER; --speculative-algorithm DFLASH is then implied.

  --mode plain   no speculative decoding
  --mode chain   SGLang's own DFLASH worker (one proposed token per position)
  --mode tree    draft trees, or an error where they cannot serve
  (no --mode)    draft trees; where they cannot serve and there is a GPU, the chain with a line that says why

`python -m sglang.launch_server --help` lists SGLang's flags.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sglang_dflash.cli.fetch import fetch_with_progress
from sglang_dflash.cli.options import description
from sglang_dflash.client import access, flags
from sglang_dflash.client.ports import require_free_port
from sglang_dflash.client.server import wait_ready
from sglang_dflash.errors import UserError
from sglang_dflash.models.pair import (
    MODE_VARIABLE,
    Mode,
    mode_environment,
    mode_of,
    pair_flags,
    quick_start,
    require_drafter,
)
from sglang_dflash.models.registry import SMOLLM2

_READY_SECONDS = 3600.0


def build_command(argv: Sequence[str]) -> tuple[list[str], dict[str, str | None], bool]:
    """SGLang's flags, the environment changes, and whether the embedded target is needed.

    Raises :class:`UserError` for flags that contradict each other.
    """
    asked, words = mode_of(argv)
    # SGLang reads the file only where it stands as a word of its own, and says nothing otherwise.
    words = [part for word in words for part in (word.split("=", 1) if _is_config(word) else [word])]
    from_environment: Mode = "chain" if os.environ.get(MODE_VARIABLE) == "chain" else "tree"
    mode = asked or from_environment
    env: dict[str, str | None] = mode_environment(mode) if asked else {}
    if flags.flag_value(flags.with_config(words), flags.MODEL) is None:
        return _embedded(words, mode), env, True
    return _own_model(words, mode, asked), env, False


def _is_config(word: str) -> bool:
    return word.partition("=")[0] in flags.CONFIG and "=" in word


def _embedded(words: list[str], mode: Mode) -> list[str]:
    said = flags.with_config(words)
    # argparse lets the last of two equal flags win, so the user's words stand behind ours; a file's
    # would stand before them.
    named = flags.config_options(words)
    algorithm = flags.flag_value(said, flags.ALGORITHM)
    if algorithm is not None and algorithm.upper() != "DFLASH":
        # Somebody else's algorithm on our target: theirs to configure.
        return [*flags.without(pair_flags(SMOLLM2, "plain"), named), *words]
    drafter = flags.flag_value(said, flags.DRAFTER)
    if mode == "plain" and (algorithm or flags.has_any(said, "--speculative-")):
        raise UserError("--mode plain and --speculative-* contradict each other; drop one of them")
    if drafter is None or mode == "plain":
        ours = pair_flags(SMOLLM2, mode)
    else:
        ours = [*pair_flags(SMOLLM2, "plain"), "--speculative-algorithm", "DFLASH"]
    return [*flags.without(ours, named), *words]


def _own_model(words: list[str], mode: Mode, asked: Mode | None) -> list[str]:
    said = flags.with_config(words)
    drafter = flags.flag_value(said, flags.DRAFTER)
    algorithm = flags.flag_value(said, flags.ALGORITHM)
    if asked == "plain" and (drafter or algorithm):
        raise UserError("--mode plain and --speculative-* contradict each other; drop one of them")
    if asked in ("tree", "chain") and drafter is None:
        raise UserError(
            f"--mode {mode} needs a drafter for your model; pass --speculative-draft-model-path "
            "(a DFlash drafter trained for this target)"
        )
    if drafter is not None and algorithm is None:
        if drafter.startswith((".", "/", "~")):
            require_drafter(Path(drafter).expanduser())
        return [*words, "--speculative-algorithm", "DFLASH"]
    if drafter is None and algorithm is None:
        print(
            "note: no drafter named, so this serves plain decoding; "
            "pass --speculative-draft-model-path for draft trees",
            file=sys.stderr,
        )
    return words


def curl_line(url: str, model: str, keyed: bool = False) -> str:
    """A request to try; the key of a ``keyed`` server stays a variable, for logs are read by others."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 64,
    }
    # A certificate seldom names the loopback address, where nobody else can answer.
    local = " -k" if url.startswith(("https://127.", "https://localhost", "https://[::1]")) else ""
    key = f' -H "Authorization: Bearer ${access.VARIABLE}"' if keyed else ""
    return (
        f"curl -s{local} {url}/v1/chat/completions{key} -H 'Content-Type: application/json' "
        f"-d '{json.dumps(body)}'"
    )


def _announce(url: str, line: str, server: int) -> None:
    """Wait for the server of process ``server`` and print ``line``; runs in a process of its own."""

    def alive() -> bool:
        try:
            os.kill(server, 0)
        except ProcessLookupError:
            return False
        return True

    try:
        if wait_ready(url, alive, _READY_SECONDS):
            key = f", with the server's key in {access.VARIABLE}" if access.VARIABLE in line else ""
            print(f"\nready. Try it{key}:\n\n  {line}\n", flush=True)
    except TimeoutError:
        print(f"{url} is not ready after {_READY_SECONDS:.0f} s; see the log above", flush=True)


def _watch(url: str, line: str) -> None:
    """Leave a process behind that prints the curl ``line``; it ends with that, or with the server.

    Forked twice, so that SGLang, which replaces this process, never has a child it does not know.
    """
    server = os.getpid()
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    if os.fork():
        os._exit(0)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            _announce(url, line, server)
    finally:
        os._exit(0)


def main(argv: list[str]) -> int:
    if any(word in ("-h", "--help") for word in argv):
        usage = "usage: sglang-dflash serve [--mode {plain,chain,tree}] [any flag of SGLang]"
        print(f"{usage}\n\n{description(__doc__, 'sglang-dflash serve')}")
        return 0
    command, env, embedded = build_command(argv)
    said = flags.with_config(command)
    host = flags.flag_value(said, flags.HOST) or flags.DEFAULT_HOST
    port = flags.port_of(said)
    require_free_port(host, port)
    if embedded:
        fetch_with_progress(SMOLLM2)
        for name, value in {"HF_HUB_OFFLINE": "1", **quick_start()}.items():
            os.environ.setdefault(name, value or "")
    for name, value in env.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    name = flags.flag_value(said, flags.SERVED_NAME) or flags.flag_value(said, flags.MODEL) or "default"
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    sys.stdout.flush()
    sys.stderr.flush()
    scheme = "https" if flags.flag_value(said, flags.CERTIFICATE) else "http"
    url = f"{scheme}://{reachable}:{port}"
    _watch(url, curl_line(url, name, keyed=flags.flag_value(said, flags.API_KEY) is not None))
    os.execv(sys.executable, [sys.executable, "-m", "sglang_dflash.cli.launch", *command])
