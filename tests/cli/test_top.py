"""``sglang-dflash top`` and the Grafana dashboard, on readings written by hand."""

from __future__ import annotations

import http.server
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from sglang_dflash.cli import top
from sglang_dflash.client.metrics import parse, read_metrics
from sglang_dflash.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SERVER = 'model_name="tiny",tp_rank="0"'


def text(passes: tuple[int, int, int], *, moved: int = 0, fallbacks: int = 0) -> str:
    """A reading: passes that gave 1, 2 and 3 tokens; every pass 8 nodes wide, 2 requests a step."""
    one, two, three = passes
    count, total = sum(passes), one + 2 * two + 3 * three
    samples = {
        "sglang:num_running_reqs": 3,
        "sglang:num_queue_reqs": 5,
        "sglang:token_usage": 0.25,
        "sglang:gen_throughput": 42.5,
        'sglang_dflash:accept_length_bucket|le="1.0"': one,
        'sglang_dflash:accept_length_bucket|le="2.0"': one + two,
        'sglang_dflash:accept_length_bucket|le="3.0"': count,
        'sglang_dflash:accept_length_bucket|le="+Inf"': count,
        "sglang_dflash:accept_length_count": count,
        "sglang_dflash:accept_length_sum": total,
        "sglang_dflash:tree_width_count": count,
        "sglang_dflash:tree_width_sum": 8 * count,
        "sglang_dflash:decode_steps_total": count / 2,
        'sglang_dflash:width_steps_total|width="1x1"': one / 2,
        'sglang_dflash:width_steps_total|width="8x6"': (two + three) / 2,
        "sglang_dflash:off_spine_accepts_total": moved / 2,
        "sglang_dflash:kv_rows_moved_total": moved,
        "sglang_dflash:drafter_fallbacks_total": fallbacks,
        "sglang_dflash:drafter_seconds_total": 0.010 * count / 2,
        "sglang_dflash:verify_seconds_total": 0.040 * count / 2,
    }
    lines = []
    for name, value in samples.items():
        name, _, extra = name.partition("|")
        lines.append(f"{name}{{{','.join(filter(None, (SERVER, extra)))}}} {value}")
    return "\n".join(lines) + "\n"


def test_the_first_frame_is_since_the_start() -> None:
    picture = top.frame(parse(text((4, 2, 2), moved=4, fallbacks=1)), None, 1.0)
    assert (picture.model, picture.running, picture.queued, picture.kv_use) == ("tiny", 3, 5, 0.25)
    assert picture.tokens_per_second == 42.5
    assert picture.accept_length == 14 / 8
    assert picture.width == 8
    assert (picture.off_spine, picture.rows_moved, picture.fallbacks) == (0.25, 0.5, 1)
    assert picture.drafter_ms == pytest.approx(10)
    assert picture.verify_ms == pytest.approx(40)
    assert picture.shares == [("1", 0.5), ("2", 0.25), ("3", 0.25)]
    assert picture.widths == [("1x1", 0.5), ("8x6", 0.5)]


def test_later_frames_are_since_the_one_before() -> None:
    before, now = parse(text((4, 2, 2), moved=4)), parse(text((4, 2, 6), moved=4))
    picture = top.frame(now, before, 2.0)
    assert picture.tokens_per_second == 12 / 2
    assert picture.accept_length == 3
    assert picture.off_spine == 0
    assert picture.shares == [("3", 1.0)]
    assert picture.widths == [("8x6", 1.0)]
    idle = top.frame(now, now, 2.0)
    assert (idle.tokens_per_second, idle.accept_length, idle.width, idle.verify_ms) == (0, None, None, None)
    assert idle.shares == idle.widths == []


def ranks(*labels: str) -> str:
    """The reading of several schedulers; every one says the same of its own work."""
    return "".join(text((4, 2, 2), moved=4, fallbacks=1).replace('tp_rank="0"', more) for more in labels)


def counts(picture: top.Frame) -> tuple[float, ...]:
    return (picture.running, picture.queued, picture.fallbacks, picture.tokens_per_second)


def test_data_parallel_ranks_add_up_and_shares_do_not() -> None:
    both = ranks('tp_rank="0",dp_rank="0"', 'tp_rank="0",dp_rank="1"').replace("0.25", "0.6", 1)
    picture = top.frame(parse(both), None, 1.0)
    assert counts(picture) == (6, 10, 2, 85.0)
    assert picture.kv_use == 0.6
    one = top.frame(parse(text((4, 2, 2), moved=4)), None, 1.0)
    assert (picture.accept_length, picture.width, picture.verify_ms, picture.shares) == (
        *(one.accept_length, one.width, one.verify_ms, one.shares),
    )


def test_ranks_of_one_batch_count_once() -> None:
    """As with --tp-size 2 --enable-metrics-for-all-schedulers, alone and beside data parallelism."""
    picture = top.frame(parse(ranks('tp_rank="1"', 'tp_rank="0"')), None, 1.0)
    assert counts(picture) == (3, 5, 1, 42.5)
    four = ranks(*(f'tp_rank="{tp}",dp_rank="{dp}"' for tp in "01" for dp in "01"))
    assert counts(top.frame(parse(four), None, 1.0)) == (6, 10, 2, 85.0)
    now = parse(four.replace('accept_length_sum{model_name="tiny",tp_rank="1"', 'other{tp_rank="1"'))
    assert top.frame(now, None, 1.0).accept_length == 14 / 8


def test_a_frame_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(top.render(top.frame(parse(text((4, 2, 2))), None, 1.0), "http://127.0.0.1:1"))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"accept length +1\.75", shown)
    assert re.search(r"running +3 +queue 5", shown)
    assert re.search(r"accepted 1 +50\.0%", shown)
    assert "50% plain, 50% 8x6" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_a_server_without_trees_is_one_line() -> None:
    with pytest.raises(UserError, match="no metrics of draft trees"):
        top.frame(parse("sglang:num_running_reqs 1\n"), None, 1.0)


@contextmanager
def page(status: int, body: str) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (404, "", "start the server with --enable-metrics"),
        (500, "", "answered 500"),
        (200, "<html>", "not Prometheus text"),
    ],
)
def test_other_pages_are_one_line(status: int, body: str, message: str) -> None:
    with page(status, body) as url, pytest.raises(UserError, match=message):
        read_metrics(url)


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "sglang_dflash.cli.main", "top", *words]


def test_no_server_is_one_line() -> None:
    done = subprocess.run(command("--url", "127.0.0.1:9"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "error: no answer from http://127.0.0.1:9 (ConnectError); is the server running?\n"


def test_once_prints_one_frame() -> None:
    with page(200, text((4, 2, 2))) as url:
        done = subprocess.run(command("--url", url, "--once"), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1.75" in done.stdout


def listen_to_ctrl_c() -> None:
    """A test run in the background of a shell has SIGINT ignored, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_ends_the_live_view() -> None:
    with page(200, text((4, 2, 2))) as url:
        screen, terminal = pty.openpty()
        live = subprocess.Popen(
            command("--url", url, "--every", "0.2"),
            stdout=terminal,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=listen_to_ctrl_c,
        )
        shown = b""
        while b"1.75" not in shown:
            assert select.select([screen], [], [], 60)[0], shown
            shown += os.read(screen, 4096)
        live.send_signal(signal.SIGINT)
        _, errors = live.communicate(timeout=60)
        os.close(terminal)
        os.close(screen)
    assert (live.returncode, errors) == (0, "")


def dashboard_metrics() -> set[str]:
    panels = json.loads((ROOT / "examples/grafana/sglang-dflash.json").read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    return {name for query in queries for name in re.findall(r"sglang(?:_dflash)?:\w+", query)}


def test_the_dashboard_adds_up_as_top_does() -> None:
    """Sums are over one of the ranks that share a batch; the pool is the fullest one."""
    panels = json.loads((ROOT / "examples/grafana/sglang-dflash.json").read_text())["panels"]
    for query in [target["expr"] for panel in panels for target in panel["targets"]]:
        series = re.findall(r"(\S+) ?\((?:rate\(|increase\()?(sglang\w*:\w+)", query)
        assert len(series) == len(re.findall(r"sglang\w*:", query)), query
        for around, name in series:
            if name == "sglang:token_usage":
                assert query == f'max({name}{{model_name=~"$model"}})'
            else:
                assert around == "moe_ep_rank)", query
                ranks = r"max without \(tp_rank, pp_rank, moe_ep_rank\)"
                assert re.search(rf"sum(?: by \((?:le|width)\))? ?\({ranks} \(\S*{name}", query)


def test_the_dashboard_and_the_docs_name_the_same_metrics() -> None:
    named = set(re.findall(r"`(sglang_dflash:\w+)`", (ROOT / "docs/metrics.md").read_text()))
    ours = {name for name in dashboard_metrics() if name.startswith("sglang_dflash:")}
    assert len(named) == 11
    assert {re.sub(r"_(sum|count|bucket)$", "", name) for name in ours} == named
