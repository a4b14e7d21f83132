"""What travels with a step's results, and SGLang's settings for metrics."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.auxiliary_output import append_auxiliary_output
from sglang.srt.runtime_context import get_observability, get_parallel, get_serving

from sglang_dflash.step.report import StepReport
from sglang_dflash.step.trace import StepTrace


def attach(output: Any, report: StepReport | StepTrace) -> None:
    """Let SGLang carry ``report`` to the host beside the step's tokens.

    Args:
        output: the step's ``LogitsProcessorOutput``.
    """
    output.auxiliary_device_output = append_auxiliary_output(output.auxiliary_device_output, report)


def metric_labels() -> dict[str, str] | None:
    """The labels of this rank's scheduler metrics, as SGLang names them; None where it exports none.

    Mirrors ``SchedulerMetricsCollector.init_new``, without the labels that are constant here.
    """
    settings, parallel = get_observability(), get_parallel()
    if not settings.enable_metrics:
        return None
    first = parallel.attn_tp_rank == 0 and parallel.attn_cp_rank == 0
    if not first and not settings.enable_metrics_for_all_schedulers:
        return None
    labels = {
        "model_name": get_serving().served_model_name,
        "tp_rank": parallel.tp_rank,
        "pp_rank": parallel.pp_rank,
    }
    if parallel.dp_rank is not None:
        labels["dp_rank"] = parallel.dp_rank
    labels |= settings.extra_metric_labels or {}
    return {name: str(value) for name, value in labels.items()}


def free_room(runner: Any) -> dict[str, int]:
    """KV slots and request rows that nobody holds; both are back to the start's when a server is idle and
    its radix cache flushed.

    Args:
        runner: the target's ``ModelRunner``.
    """
    return {
        "kv_slots": int(runner.token_to_kv_pool_allocator.available_size()),
        "request_rows": int(runner.req_to_token_pool.available_size()),
    }
