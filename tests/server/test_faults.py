"""Metrics of a real server, and a drafter that fails in it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file, save_file

from sglang_dflash.client.metrics import Scrape, read_metrics
from sglang_dflash.errors import UserError
from tests.server.support import ROOT, Pair, Serving, body_of, dflash_args, tiny_args
from tests.server.test_paths import requests_for

pytestmark = pytest.mark.server

NODES = 24  # of the tiny tree server
BODIES = [body_of(request, ignore_eos=True) for request in requests_for(12, 60, seed=21)]


def damaged(bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same requests; a NaN gets into the drafter's cache after ten tokens."""
    return [
        body | {"sampling_params": body["sampling_params"] | {"custom_params": {"damage": 10}}}
        for body in bodies
    ]


def grown(pair: Pair, bodies: Sequence[dict[str, Any]], batch: int) -> tuple[Scrape, list[dict[str, Any]]]:
    """Requests through both servers, compared; what the tree server's metrics grew by, and its replies."""
    before = read_metrics(pair.tree.server.url)
    _, replies = pair.compare(bodies, batch)
    after = read_metrics(pair.tree.server.url)
    samples = [replace(s, value=s.value - before.total(s.name, **s.labels)) for s in after.samples]
    return Scrape(samples), replies


def passes(replies: Sequence[dict[str, Any]]) -> list[int]:
    return [reply["meta_info"]["spec_verify_ct"] for reply in replies]


def alike(passes: Sequence[int], usual: Sequence[int]) -> bool:
    """What served requests teach of recalled text moves a request's passes by one."""
    return all(abs(now - then) <= 1 for now, then in zip(passes, usual, strict=True))


def test_metrics_add_up_to_what_the_replies_say(tiny_servers: Pair) -> None:
    metrics, replies = grown(tiny_servers, BODIES, 5)
    steps = sum(passes(replies))
    tokens = sum(reply["meta_info"]["completion_tokens"] for reply in replies)

    def value(name: str, **labels: str) -> float:
        return metrics.total(f"sglang_dflash:{name}", **labels)

    # Each request's first token comes from prefill.
    assert value("accept_length_sum") == tokens - len(BODIES)
    assert value("accept_length_count") == steps
    assert value("accept_length_bucket", le="+Inf") == steps
    assert value("tree_width_count") == steps
    assert value("tree_width_sum") == NODES * steps
    assert 0.8 * steps < value("off_spine_accepts_total") <= steps
    assert value("off_spine_accepts_total") <= value("kv_rows_moved_total") <= tokens
    assert value("drafter_fallbacks_total") == 0
    assert 0 < value("decode_steps_total") <= steps + len(BODIES)
    assert value("drafter_seconds_total") > 0
    assert value("verify_seconds_total") > 0


def test_the_dashboard_asks_for_what_the_server_exports(tiny_servers: Pair) -> None:
    panels = json.loads((ROOT / "examples/grafana/sglang-dflash.json").read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    wanted = {name for query in queries for name in re.findall(r"sglang(?:_dflash)?:\w+", query)}
    assert len(wanted) > 10
    scrape = read_metrics(tiny_servers.tree.server.url)
    assert wanted <= scrape.names()
    assert {s.labels["model_name"] for s in scrape.samples if s.name.startswith("sglang_dflash:")}


def test_top_shows_the_server(tiny_servers: Pair) -> None:
    command = [sys.executable, "-m", "sglang_dflash.cli.main", "top", "--once", "--url"]
    done = subprocess.run(
        [*command, tiny_servers.tree.server.url], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"accept length +\d\.\d\d", done.stdout)
    assert re.search(rf"width +{NODES}", done.stdout)
    plain = subprocess.run(
        [*command, tiny_servers.plain.server.url], capture_output=True, text=True, timeout=300
    )
    assert plain.returncode == 2
    assert plain.stderr.endswith("start the server with --enable-metrics\n")
    assert plain.stderr.count("\n") == 1


def test_a_nan_in_the_drafters_cache_costs_a_few_steps_and_no_token(tiny_servers: Pair) -> None:
    sound, replies = grown(tiny_servers, BODIES, 4)
    usual = passes(replies)
    # Alone: the step that meets the NaN falls back, and the one that is under way when that is known.
    alone, _ = grown(tiny_servers, damaged(BODIES[:1]), 1)
    assert 1 <= alone.total("sglang_dflash:drafter_fallbacks_total") <= 2
    # Among others: their steps are as many as ever.
    mixed = [body for both in zip(damaged(BODIES[4:8]), BODIES[:4], strict=True) for body in both]
    among, replies = grown(tiny_servers, mixed, 4)
    assert among.total("sglang_dflash:drafter_fallbacks_total") >= 4
    assert alike(passes(replies)[1::2], usual[:4])
    # And all is well again, in the radix cache too.
    again, replies = grown(tiny_servers, BODIES, 4)
    assert sound.total("sglang_dflash:drafter_fallbacks_total") == 0
    assert again.total("sglang_dflash:drafter_fallbacks_total") == 0
    assert alike(passes(replies), usual)
    assert "cleaned the drafter's KV cache" in tiny_servers.tree.server.output()


@pytest.mark.slow
def test_damaged_weights_are_one_line(serving: Serving, tiny_pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A damaged byte in the scheduler's own log: the cause stands where the traceback would."""
    target, drafter = tiny_pair
    damaged = Path(shutil.copytree(drafter, tmp_path / "damaged"))
    weights = load_file(damaged / "model.safetensors")
    weights["layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, damaged / "model.safetensors")
    with (
        pytest.raises(UserError, match=r"gate_up_proj\.weight holds NaN or infinity.*fetch it again"),
        serving("damaged", tiny_args(target, *dflash_args(damaged, 16))),
    ):
        pass


def test_only_loopback_and_no_remote_code(tiny_servers: Pair) -> None:
    for client in (tiny_servers.plain, tiny_servers.tree):
        assert client.info().model_dump()["trust_remote_code"] is False
        root = psutil.Process(client.server.pid)
        listening = {
            connection.laddr
            for process in (root, *root.children(recursive=True))
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert {address.ip for address in listening if address.port == client.server.port} == {"127.0.0.1"}
        # torch.distributed's rendezvous store knows no loopback; every SGLang server has it.
        assert len({address.port for address in listening if address.ip not in ("127.0.0.1", "::1")}) <= 1
