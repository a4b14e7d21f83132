"""The servers that a benchmark compares: all started once, and only the measured one at work.

One plain server, one with SGLang's own chain, and one with draft trees for all widths: it follows the setting
in a control file (``SGLANG_DFLASH_WIDTH=control:FILE``), so that two widths differ in nothing else.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import psutil
from serving_rows import AUTO, CHAIN, PLAIN, ROOT

from sglang_dflash.cli.target import Target
from sglang_dflash.client.info import ServerInfo, read_server_info
from sglang_dflash.client.ports import free_port
from sglang_dflash.client.server import Server
from sglang_dflash.drafter import read_config
from sglang_dflash.errors import UserError
from sglang_dflash.models.cache import CACHE_VARIABLE, make_dir
from sglang_dflash.models.pair import MODES, Mode, mode_environment
from sglang_dflash.step.width import Width
from sglang_dflash.worker.width.policy import check_setting

FIXED = ("2x2", "3x3", "4x4", "8x6", "16x6")
METHODS = (PLAIN, CHAIN, *FIXED, AUTO)
NODES = 16
#: What a server of the embedded pair takes while it loads; with less they are started one by one.
BYTES_TO_START = 4 << 30


def check_methods(methods: Sequence[str], pair: Target, nodes: int) -> None:
    """Raises UserError for a method that is none, or a width that the drafter does not have."""
    widest = Width(nodes, read_config(pair.drafter).block)
    for method in methods:
        if method in (PLAIN, CHAIN):
            continue
        try:
            check_setting(method, widest)
        except UserError as error:
            raise UserError(f"no method {method!r}: plain, chain, or {error}") from error
        if method.startswith("random"):
            raise UserError(f"no method {method!r}: another width every step is no width to compare")


@dataclass(frozen=True)
class Steps:
    """Decode steps of ``auto``: how many at each width, and how many probes among them."""

    counts: dict[str, int]
    probes: int

    @property
    def shares(self) -> dict[str, float]:
        total = sum(self.counts.values()) or 1
        return {width: round(count / total, 4) for width, count in self.counts.items()}


class Fleet:
    """The servers of some methods, for the length of a ``with`` block.

    Args:
        pair: served by all.
        methods: ``plain``, ``chain``, or a setting of ``SGLANG_DFLASH_WIDTH``: ``auto``, ``2x2``, ...
        folder: takes logs, the control file and the tree server's cost table: a benchmark does not start
            from what other commands have measured, nor leave them its own.
        nodes: the tree server's ``--speculative-num-draft-tokens``.
        flags: more of SGLang's, for all.
        env: more, for all.
        tree_first: start the tree server first, not last.
    """

    def __init__(
        self,
        pair: Target,
        methods: Sequence[str],
        folder: Path,
        *,
        nodes: int = NODES,
        flags: Sequence[str] = (),
        env: Mapping[str, str | None] | None = None,
        tree_first: bool = False,
    ) -> None:
        self.folder = make_dir(folder).absolute()
        self.control = self.folder / "width"
        self._stack = ExitStack()
        self._auto = Steps({}, 0)
        self.info: dict[Mode, ServerInfo] = {}
        self.servers: dict[Mode, Server] = {}
        wanted = {mode_of(method) for method in methods}
        for mode in sorted(MODES, key=lambda mode: (mode == "tree") != tree_first):
            if mode not in wanted:
                continue
            words = [*pair.flags[mode], *flags]
            if "--sleep-on-idle" not in words:
                words.append("--sleep-on-idle")
            more: dict[str, str | None] = {"SGLANG_DFLASH_WIDTH": None}
            if mode == "tree":
                words += ["--speculative-num-draft-tokens", str(nodes)]
                more = {
                    "SGLANG_DFLASH_WIDTH": f"control:{self.control}",
                    CACHE_VARIABLE: str(self.folder / "cache"),
                }
            self.servers[mode] = Server(
                words,
                port=self._free_port(),
                log=self.folder / f"{mode}.log",
                env={**pair.env, **mode_environment(mode), **more, **(env or {})},
            )

    def _free_port(self) -> int:
        taken = {server.port for server in self.servers.values()}
        while (port := free_port()) in taken:
            pass
        return port

    def __enter__(self) -> Fleet:
        """Start them, the tree server alone: what a step costs is measured at its start."""
        # The last run's width would be one that pins the server, which then measures no table for ``auto``.
        self.control.unlink(missing_ok=True)
        with self._stack:
            waiting: list[Server] = []
            before: Mode | None = None
            for mode, server in self.servers.items():
                roomy = psutil.virtual_memory().available > (len(waiting) + 1) * BYTES_TO_START
                if "tree" in (mode, before) or not roomy:
                    _wait(waiting)
                before = mode
                self._stack.callback(server.stop)
                server.launch()
                waiting.append(server)
            _wait(waiting)
            self.info = {mode: read_server_info(server.url) for mode, server in self.servers.items()}
            if "tree" in self.info:
                marker = self.info["tree"].marker
                if marker is None or marker.mode != "tree":
                    raise UserError(
                        "the server does not use this plugin's tree worker; run `sglang-dflash doctor`"
                    )
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def use(self, method: str) -> str:
        """The URL that serves ``method`` now, its prefix cache empty: prompts that another method's turn
        left there would make it look faster."""
        mode = mode_of(method)
        if mode == "tree":
            draft = self.control.with_suffix(".new")
            draft.write_text(method + "\n")
            os.replace(draft, self.control)
        url = self.servers[mode].url
        flush(url)
        return url

    def steps(self, method: str) -> Steps | None:
        """What ``auto`` did since this was last asked of it; None for another method.

        To be asked after every turn of a tree method: raises UserError where the server did not follow the
        control file, which it reads when a step is scheduled.
        """
        if mode_of(method) != "tree":
            return None
        marker = read_server_info(self.servers["tree"].url).marker
        said: dict[str, Any] = (marker.model_extra or {}).get("width") or {} if marker else {}
        if method not in (said.get("policy"), said.get("width")):
            raise UserError(f"the tree server was told {method} and says {said}; see {self.folder}/tree.log")
        if method != AUTO:
            return None
        counts = {width: round(share * said["rounds"]) for width, share in said["steps"].items()}
        before, self._auto = self._auto, Steps(counts, said["probes"])
        return Steps(
            {w: n - before.counts.get(w, 0) for w, n in counts.items() if n > before.counts.get(w, 0)},
            said["probes"] - before.probes,
        )


def mode_of(method: str) -> Mode:
    return "plain" if method == PLAIN else "chain" if method == CHAIN else "tree"


def _wait(waiting: list[Server]) -> None:
    while waiting:
        waiting.pop(0).wait()


def flush(url: str, seconds: float = 60.0) -> None:
    """Empty the prefix cache, as soon as nothing runs any more."""
    end = time.monotonic() + seconds
    while True:
        reply = httpx.post(f"{url}/flush_cache", timeout=seconds, trust_env=False)
        if reply.status_code == 200:
            return
        if time.monotonic() > end:
            raise UserError(f"{url} did not empty its cache within {seconds:.0f} s: {reply.text.strip()}")
        time.sleep(0.1)


def importable() -> dict[str, str | None]:
    """Environment in which a server finds ``benchmarks``."""
    return {"PYTHONPATH": str(ROOT)}
