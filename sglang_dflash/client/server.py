"""Run an SGLang server as a child process: start, wait until it serves, stop without leftovers."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import httpx

from sglang_dflash.client import places
from sglang_dflash.client.fast_start import keep_compiled
from sglang_dflash.client.ports import require_free_port
from sglang_dflash.errors import UserError

LAUNCH = [sys.executable, "-m", "sglang.launch_server"]
_PR_SET_PDEATHSIG = 1
_STOP_SECONDS = 20.0


def _die_with_parent() -> None:
    # Between fork and exec: a server must not outlive the command that started it, kill -9 included.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def wait_ready(
    url: str, alive: Callable[[], bool], timeout: float, tick: Callable[[], None] = lambda: None
) -> bool:
    """Poll ``/health`` until the server answers 200; False when ``alive()`` says that it is gone.

    Raises TimeoutError after ``timeout`` seconds. SGLang's ``/health`` turns 200 after its warm-up.
    """
    end = time.monotonic() + timeout
    # Only whether it answers is asked, of a server started here: its certificate is not ours to judge.
    with httpx.Client(timeout=5.0, trust_env=False, verify=False) as http:
        while time.monotonic() < end:
            if not alive():
                return False
            tick()
            with contextlib.suppress(httpx.HTTPError):
                if http.get(f"{url}/health").status_code == 200:
                    return True
            time.sleep(0.3)
    raise TimeoutError(f"{url} was not ready after {timeout:.0f} s")


def cause_of_death(log: str) -> str:
    """The line of a dead server's log that says why: ours if there is one, else the last error."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for line in reversed(lines):
        if "sglang-dflash:" in line and "Traceback" not in line:
            return line[line.index("sglang-dflash:") + len("sglang-dflash:") :].strip()
    for index in range(len(lines) - 1, -1, -1):
        name, _, message = lines[index].partition(":")
        if name.endswith(("Error", "Exception", "Exit")) and " " not in name:
            # Some messages start on the line below the exception's name.
            below = lines[index + 1] if not message.strip() and index + 1 < len(lines) else ""
            return f"{lines[index]} {below}".strip()
    return lines[-1] if lines else "it wrote nothing"


class Server:
    """``python -m sglang.launch_server`` on loopback, for the length of a ``with`` block.

    Args:
        args: SGLang's flags, without ``--host`` and ``--port``.
        port: on 127.0.0.1; must be free.
        log: file that takes the server's output.
        env: added to this process's environment; a value None removes the variable.
        timeout: seconds until the server must be ready.
        tick: called about three times a second while waiting (progress).

    Raises:
        UserError: the port is taken, or the server died or was not ready in time; the message
            holds the cause from the log and names the log file.
    """

    def __init__(
        self,
        args: Sequence[str],
        *,
        port: int,
        log: Path,
        env: Mapping[str, str | None] | None = None,
        timeout: float = 600.0,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self.args = list(args)
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self._env = dict(env or {})
        self._timeout = timeout
        self._tick = tick
        self._process: subprocess.Popen[bytes] | None = None
        self._launched = 0.0
        self.start_seconds = 0.0

    def __enter__(self) -> Server:
        self.launch()
        self.wait()
        return self

    def launch(self) -> None:
        """Start the process and return; :meth:`wait` must follow, and :meth:`stop` whatever happens.

        The process ends with the thread that calls this.
        """
        require_free_port("127.0.0.1", self.port)
        environ = dict(os.environ)
        for name, value in self._env.items():
            if value is None:
                environ.pop(name, None)
            else:
                environ[name] = value
        keep_compiled(environ)
        places.settle(environ)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._launched = time.monotonic()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*LAUNCH, "--host", "127.0.0.1", "--port", str(self.port), *self.args],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environ,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def wait(self) -> None:
        """Until the launched server serves; one that does not is stopped, and UserError says why."""
        try:
            ready = wait_ready(self.url, self.alive, self._timeout, self._tick)
        except TimeoutError as error:
            self.stop()
            raise UserError(f"the server {error}; see {self.log}") from error
        except BaseException:
            self.stop()
            raise
        if not ready:
            self.stop()
            raise UserError(f"the server did not start: {cause_of_death(self.output())} (log: {self.log})")
        self.start_seconds = time.monotonic() - self._launched

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError("the server was not started")
        return self._process.pid

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def stop(self) -> None:
        """End the server and every process of its session; safe to call twice."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_SECONDS)
        # Whatever is left of the session: SGLang's children when the parent died first.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._process = None
