"""What a step reports is what Prometheus shows."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from prometheus_client import REGISTRY

from sglang_dflash.step.report import FALLBACK, StepReport, StepResult
from sglang_dflash.step.timing import Laps
from sglang_dflash.step.width import Width
from sglang_dflash.worker.metrics import Metrics

LABELS = {"model_name": "test", "tp_rank": "0"}


def value(name: str, **labels: str) -> float:
    found = REGISTRY.get_sample_value(f"sglang_dflash:{name}", LABELS | labels)
    assert found is not None, name
    return found


def test_a_report_reaches_the_metrics() -> None:
    metrics, copies = Metrics(LABELS), []

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        copies.append(tensor)
        return tensor.clone()

    def step(rows: list[int], committed: list[int]) -> None:
        laps = Laps("cpu", enabled=True)
        for _ in range(7):
            laps.mark()
        rows_of = torch.tensor(rows, dtype=torch.int32)
        accepted = torch.tensor([max(n, 1) for n in committed], dtype=torch.int32)
        report = StepReport(
            0, Width(16, 6), rows_of, accepted, [False] * len(rows), None, None, laps, metrics
        )
        commits = [None if n == 0 else SimpleNamespace(token_ids=(7,) * n) for n in committed]
        report.copy_to_host(copy).consume(None, commits)

    step([0, 3, FALLBACK, 2], [4, 5, 1, 0])  # the last had ended before: not counted at all
    step([1], [2])
    assert [list(tensor.shape) for tensor in copies] == [[8], [2]]
    assert value("accept_length_sum") == 12
    assert value("accept_length_count") == 4
    assert value("accept_length_bucket", le="1.0") == 1
    assert value("accept_length_bucket", le="4.0") == 3
    assert value("tree_width_sum") == 64
    assert value("decode_steps_total") == 2
    assert value("width_steps_total", width="16x6") == 2
    assert value("drafted_tokens_total") == 4 * 5
    assert value("off_spine_accepts_total") == 2
    assert value("kv_rows_moved_total") == 4
    assert value("drafter_fallbacks_total") == 1
    assert value("drafter_seconds_total") > 0
    assert value("verify_seconds_total") > 0
    assert value("commit_seconds_total") > 0


def test_without_metrics_no_clock_is_read() -> None:
    laps = Laps("cuda:0", enabled=False)  # would need CUDA if it did anything
    laps.mark()
    assert laps.seconds() is None
    result = StepResult(0, Width(8, 6), [0, FALLBACK, 1], *[[1, 1, 1]] * 2, [False] * 3, None, None, None)
    assert result.fallbacks == 1
