"""Thirty minutes of everything at once against the tree server, every answer compared with plain decoding.

    python benchmarks/soak.py --minutes 30              # or: make soak

First a plain server (with the plugin, without overlap) answers every request once; it is stopped, then
the tree server gets the same requests in random order, streamed, whole, aborted, at 1 to 32 in flight,
while some drafts are made to fail. Both in float32, where equal means equal. At the end the server is
flushed and must be where it began. Writes the report to --report (.md and .json); exit code 1 if
anything was wrong. Ctrl-C ends the load early, not the report. Loopback only.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import httpx
import psutil
import soak_talk
from rich.console import Console
from serving_rows import machine
from soak_load import HOWS, TALKS, Answer, How, Task, ask, differences, make_tasks, strangers, until

from sglang_dflash.client.info import read_server_info
from sglang_dflash.client.metrics import read_metrics
from sglang_dflash.client.ports import free_port
from sglang_dflash.client.server import Server
from sglang_dflash.errors import UserError
from sglang_dflash.models.cache import make_dir
from sglang_dflash.models.fetch import fetch
from sglang_dflash.models.pair import quick_start
from sglang_dflash.models.prompts import prompts_file
from sglang_dflash.models.registry import SMOLLM2

LEVELS = (1, 4, 32, 8, 16, 2)
# A process's memory may settle while it meets its first shapes; after that it has to stay.
WARM_UP_SHARE = 0.2
RSS_BOUND = 256 << 20
RETRACT_SECONDS = 20.0  # from one retraction of all that runs to the next
SHOWN = 20
_ARGS = [
    *("--dtype", "float32", "--sleep-on-idle", "--skip-server-warmup", "--log-level", "info"),
    *("--enable-custom-logit-processor", "--enable-streaming-session", "--tool-call-parser", "qwen"),
]
# Room for about ten requests of the mix: the others wait, and some are retracted.
_TREE_ARGS = [
    *("--max-total-tokens", "6144", "--max-running-requests", "16", "--chunked-prefill-size", "256"),
    *("--schedule-conservativeness", "0.1", "--enable-metrics"),
]
_BAD_LINE = re.compile(r"^(\[[^\]]*\] )?(ERROR|CRITICAL)\b|Traceback \(most recent call last\)")


@dataclass
class Report:
    """What happened; ``wrong`` says whether any of it should not have."""

    started: str
    machine: str
    minutes: float
    tasks: int
    requests: Counter = field(default_factory=Counter)
    kinds: Counter = field(default_factory=Counter)
    levels: Counter = field(default_factory=Counter)
    tokens: int = 0
    compared: int = 0
    aborts: int = 0
    errors: int = 0
    mismatches: int = 0
    cross_talk: int = 0
    drafter_faults: int = 0
    retractions: int = 0
    accept_length: float = 0.0
    leaks: list[str] = field(default_factory=list)
    log_errors: int = 0
    start: dict[str, float] = field(default_factory=dict)
    end: dict[str, float] = field(default_factory=dict)
    shown: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> bool:
        return bool(self.errors or self.mismatches or self.cross_talk or self.leaks or self.log_errors)


class Soak:
    """The load: threads that ask at random and compare; counts go into ``report``."""

    def __init__(self, url: str, tasks: Sequence[Task], answers: dict[int, Answer], report: Report) -> None:
        self.tasks, self.answers, self.report = tasks, answers, report
        self.words = [task.word for task in tasks]
        limits = httpx.Limits(max_connections=128)
        self.http = httpx.Client(base_url=url, timeout=600.0, trust_env=False, limits=limits)
        self.lock = threading.Lock()
        self.stopped = threading.Event()

    def phase(self, level: int, end: float, seed: int) -> None:
        """Keep ``level`` requests in flight until ``end`` (monotonic)."""

        def work(worker: int) -> None:
            draw = random.Random(f"{seed}-{worker}")
            while time.monotonic() < end and self.report.errors < SHOWN and not self.stopped.is_set():
                self.one(draw, level)

        with ThreadPoolExecutor(level) as pool:
            running = [pool.submit(work, worker) for worker in range(level)]
            while wait(running, timeout=RETRACT_SECONDS).not_done:
                retract(str(self.http.base_url).rstrip("/"))
            for future in running:
                future.result()

    def one(self, draw: random.Random, level: int) -> None:
        task = draw.choice(self.tasks)
        how = "whole" if task.kind in TALKS else draw.choices(HOWS, weights=(45, 40, 8, 7))[0]
        try:
            got = exchange(self.http, task, how, draw.randrange(1, 6))
        except (httpx.HTTPError, ValueError, KeyError) as error:
            with self.lock:
                self.report.errors += 1
                self.show(f"{task.kind}, {how}, {level} in flight: {type(error).__name__}: {error}")
            return
        found = differences(task, got, self.answers.get(task.number))
        seen = strangers(got, task, self.words)
        with self.lock:
            self.count(task, how, level, got)
            self.report.mismatches += bool(found)
            self.report.cross_talk += bool(seen)
            for line in found:
                self.show(f"{task.kind} (task {task.number}), {how}, {level} in flight: {line}")
            for word in seen:
                self.show(f"{task.kind} (task {task.number}) shows {word}: {got.text!r}")

    def count(self, task: Task, how: str, level: int, got: Answer) -> None:
        report = self.report
        report.requests[how] += 1
        report.kinds[task.kind] += 1
        report.levels[str(level)] += 1
        report.tokens += len(got.ids)
        report.compared += task.number in self.answers
        report.aborts += not got.whole
        report.retractions += got.retractions

    def show(self, line: str) -> None:
        if len(self.report.shown) < SHOWN:
            self.report.shown.append(line)


def exchange(http: httpx.Client, task: Task, how: How = "whole", after: int = 3) -> Answer:
    """Ask a task, whatever it takes."""
    return soak_talk.ask(http, task) if task.kind in TALKS else ask(http, task, how, after)


def retract(url: str) -> None:
    """Take the KV of all that runs; it is read again with what it has said."""
    for route, body in (("/pause_generation", {"mode": "retract"}), ("/continue_generation", {})):
        httpx.post(f"{url}{route}", json=body, timeout=120, trust_env=False).raise_for_status()


def memory(pid: int) -> int:
    """Resident bytes of a process and all below it."""
    root = psutil.Process(pid)
    return sum(process.memory_info().rss for process in (root, *root.children(recursive=True)))


def levels_of(url: str, pid: int) -> dict[str, float]:
    """What must come back to where it was: free KV slots, free request rows, memory."""
    states = read_server_info(url).internal_states
    free = states[0]["dflash"]["free"]
    return {**free, "rss_mb": memory(pid) / 1e6}


def flush(url: str) -> bool:
    """Wait until nothing runs and empty the radix cache; False when the server stays busy."""

    def flushed() -> bool:
        return httpx.post(f"{url}/flush_cache", timeout=60, trust_env=False).status_code == 200

    return until(flushed, 120)


def leaks(start: dict[str, float], warm_rss: float, end: dict[str, float]) -> list[str]:
    found = [
        f"{name}: {start[name]:.0f} free at the start, {end[name]:.0f} at the end"
        for name in ("kv_slots", "request_rows")
        if start[name] != end[name]
    ]
    if end["rss_mb"] - warm_rss > RSS_BOUND / 1e6:
        found.append(f"memory grew by {end['rss_mb'] - warm_rss:.0f} MB after the first fifth of the run")
    return found


def log_config(folder: Path) -> Path:
    """A logging configuration that writes levels: SGLang's own lines do not show them."""
    file = folder / "logging.json"
    handler = {"class": "logging.StreamHandler", "formatter": "level"}
    config = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"level": {"format": "[%(asctime)s] %(levelname)s %(name)s: %(message)s"}},
        "handlers": {"all": handler},
        "root": {"level": "INFO", "handlers": ["all"]},
        "loggers": {"httpx": {"level": "WARNING"}, "httpcore": {"level": "WARNING"}},
    }
    file.write_text(json.dumps(config))
    return file


def bad_lines(log: str) -> list[str]:
    return [line for line in log.splitlines() if _BAD_LINE.search(line)]


def plain_answers(tasks: Sequence[Task], folder: Path, env: dict[str, str | None]) -> dict[int, Answer]:
    """Every exact task's answer from plain decoding."""
    small = ["--max-total-tokens", "16384", "--disable-overlap-schedule"]
    args = ["--model-path", str(SMOLLM2.target_dir), *_ARGS, *small]
    exact = [task for task in tasks if task.exact]
    with Server(args, port=free_port(), log=folder / "plain.log", env=env) as server:
        http = httpx.Client(base_url=server.url, timeout=600.0, trust_env=False)
        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(lambda task: exchange(http, task), exact))
    return {task.number: reply for task, reply in zip(exact, replies, strict=True)}


def run(minutes: float, count: int, seed: int, folder: Path, console: Console) -> Report:
    from transformers import AutoTokenizer

    from sglang_dflash.client.chat import read_prompts

    target = fetch(SMOLLM2)
    tasks = make_tasks(AutoTokenizer.from_pretrained(target), read_prompts(prompts_file()), count, seed)
    report = Report(datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), machine(), minutes, len(tasks))
    env: dict[str, str | None] = {
        **quick_start(),
        "SGLANG_LOGGING_CONFIG_PATH": str(log_config(folder)),
        "SGLANG_DFLASH_CANDIDATES": "benchmarks.soak_faults:candidates",
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    }
    console.print(f"plain decoding answers {len(tasks)} requests")
    answers = plain_answers(tasks, folder, env)
    console.print(f"{len(answers)} answers; starting the tree server")
    drafter = [
        "--speculative-algorithm",
        "DFLASH",
        "--speculative-draft-model-path",
        str(SMOLLM2.drafter_dir),
    ]
    args = ["--model-path", str(target), *_ARGS, *_TREE_ARGS, *drafter]
    with Server(args, port=free_port(), log=folder / "tree.log", env=env) as server:
        soak = Soak(server.url, tasks, answers, report)
        for task in tasks[:4]:
            ask(soak.http, task)
        flush(server.url)
        # SGLang's request after its warm-up may find its own port still closed and warns with a traceback.
        log_start = len(server.output())
        report.start = levels_of(server.url, server.pid)
        signal.signal(signal.SIGINT, lambda *_: soak.stopped.set())
        begin, warm_rss = time.monotonic(), 0.0
        end = begin + 60 * minutes
        step = min(60.0, 60 * minutes / len(LEVELS))
        phase = 0
        while (now := time.monotonic()) < end and report.errors < SHOWN and not soak.stopped.is_set():
            if not warm_rss and now - begin > WARM_UP_SHARE * 60 * minutes:
                warm_rss = memory(server.pid) / 1e6
            level = LEVELS[phase % len(LEVELS)]
            soak.phase(level, min(now + step, end), seed + phase)
            phase += 1
            console.print(
                f"{(time.monotonic() - begin) / 60:5.1f} min, {level:2} in flight: "
                f"{sum(report.requests.values())} requests, {report.tokens} tokens, "
                f"{report.mismatches} mismatches, {report.cross_talk} cross-talk, {report.errors} errors, "
                f"{memory(server.pid) / 1e6:.0f} MB"
            )
        report.minutes = round((time.monotonic() - begin) / 60, 1)
        finish(server, soak, report, warm_rss, log_start)
    return report


def finish(server: Server, soak: Soak, report: Report, warm_rss: float, log_start: int) -> None:
    """The state after the load: flushed, quiet, and as at the start."""
    if not flush(server.url):
        report.leaks.append("the server still has requests two minutes after the last")
    report.end = levels_of(server.url, server.pid)
    report.leaks += leaks(report.start, warm_rss or report.start["rss_mb"], report.end)
    metrics = read_metrics(server.url)
    report.drafter_faults = int(metrics.total("sglang_dflash:drafter_fallbacks_total"))
    steps = metrics.total("sglang_dflash:accept_length_count")
    report.accept_length = metrics.total("sglang_dflash:accept_length_sum") / max(steps, 1)
    found = bad_lines(server.output()[log_start:])
    report.log_errors = len(found)
    for line in found:
        soak.show(f"log: {line}")


def markdown(report: Report) -> str:
    def both(name: str) -> str:
        return f"{report.start.get(name, 0):.0f}, {report.end.get(name, 0):.0f}"

    rows = {
        "requests": sum(report.requests.values()),
        "of them " + ", ".join(report.requests): ", ".join(map(str, report.requests.values())),
        "in flight " + ", ".join(report.levels): ", ".join(map(str, report.levels.values())),
        "tokens received": report.tokens,
        "accept length": f"{report.accept_length:.2f}",
        "answers compared with plain decoding": report.compared,
        "mismatches": report.mismatches,
        "cross-talk (another request's word)": report.cross_talk,
        "broken off by the client or aborted": report.aborts,
        "request steps whose draft was made to fail": report.drafter_faults,
        "retractions of a request, for want of KV or with all that ran": report.retractions,
        "HTTP errors": report.errors,
        "log lines at ERROR or above": report.log_errors,
        "leaks": len(report.leaks),
        "free KV slots, start and end": both("kv_slots"),
        "free request rows, start and end": both("request_rows"),
        "memory, start and end, MB": both("rss_mb"),
    }
    lines = [
        "# Soak",
        "",
        f"`make soak`, {report.started}, {report.minutes:g} minutes on {report.machine}: the embedded pair "
        f"in float32, {report.tasks} different requests, kinds: "
        + ", ".join(f"{kind} {count}" for kind, count in sorted(report.kinds.items()))
        + ".",
        "",
        "| what | count |",
        "| --- | ---: |",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        f"Every {RETRACT_SECONDS:.0f} s all that runs loses its KV and is read again with what it has said. "
        "Every answer but those sampled without a seed is compared with plain decoding's, token for token; "
        "of a broken-off one what came is. Memory may grow by "
        f"{RSS_BOUND >> 20} MiB over the server's processes after the first fifth of the run.",
    ]
    if report.wrong:
        lines += ["", "Wrong:", "", *(f"- {line}" for line in (*report.leaks, *report.shown))]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="length of the load (%(default)s)")
    parser.add_argument("--tasks", type=int, default=138, help="different requests (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the requests and their order (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/soak"), help="logs (%(default)s)")
    parser.add_argument("--report", type=Path, default=Path("docs/soak.md"), help="%(default)s and .json")
    args = parser.parse_args(argv)
    if args.minutes <= 0 or args.tasks < 1:
        raise UserError("--minutes and --tasks take numbers above 0")
    console = Console(highlight=False, soft_wrap=True)
    report = run(args.minutes, args.tasks, args.seed, make_dir(args.out).absolute(), console)
    args.report.write_text(markdown(report))
    args.report.with_suffix(".json").write_text(json.dumps(vars(report), indent=1) + "\n")
    console.print(markdown(report), markup=False)
    return int(report.wrong)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
