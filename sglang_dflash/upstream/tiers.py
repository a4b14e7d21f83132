"""A CUDA graph for every width, beside the one that SGLang captures.

SGLang's runner is captured for one number of rows per request and falls back to eager, silently, for any
other (``model_executor/runner/decode_cuda_graph_runner.py``, ``can_run_graph``). Its adaptive EAGLE has one
backend and one runner per width and swaps both (``speculative/eagle_worker_v2.py``,
``build_adaptive_runtime_state``); so do these.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.runtime_context import get_spec

logger = logging.getLogger("sglang_dflash")

# A capture that would leave less than this free is not begun: requests need workspace too.
MIN_FREE_BYTES = 2 << 30


@dataclass(frozen=True)
class _Tier:
    backend: Any
    graphs: Any


class GraphTiers:
    """The graphs of one model runner, by rows per request.

    Args:
        runner: SGLang's ``ModelRunner``, its own graph captured.
        rows: that graph's rows per request.
        prepare: puts our kernel into a new attention backend.
    """

    def __init__(self, runner: Any, rows: int, prepare: Callable[[Any], None]) -> None:
        self.runner = runner
        self._prepare = prepare
        self._widest = _Tier(runner.attn_backend, runner.decode_cuda_graph_runner)
        self._tiers = {rows: self._widest}

    @property
    def captured(self) -> dict[int, tuple[int, ...]]:
        """Rows per request -> batch sizes with a graph, ascending."""
        return {rows: tuple(sorted(tier.graphs.capture_bs)) for rows, tier in self._tiers.items()}

    def capture(self, widths: Sequence[int], before: Callable[[int], None] | None = None) -> None:
        """Capture a graph for each of ``widths`` rows, the first ones first, while memory lasts.

        ``before`` is called with each width: what the model is to know of it is captured too.
        """
        for rows in widths:
            if rows in self._tiers:
                continue
            free, _ = torch.cuda.mem_get_info(self.runner.device)
            if free < MIN_FREE_BYTES:
                logger.warning(
                    "no CUDA graph for %d rows a request and wider: %.1f GB are free; lower "
                    "--mem-fraction-static to have them",
                    rows,
                    free / 2**30,
                )
                return
            if before is not None:
                before(rows)
            with get_spec().override(speculative_num_draft_tokens=rows):
                backend = self.runner._get_attention_backend(init_new_workspace=True)
                self._prepare(backend)
                graphs = self.runner._decode_cuda_graph_runner_cls()(
                    self.runner, attn_backend=backend, speculative_num_draft_tokens=rows
                )
            self._tiers[rows] = _Tier(backend, graphs)

    @contextmanager
    def of(self, rows: int) -> Iterator[None]:
        """Run passes of ``rows`` rows a request; without a graph of that width they are eager."""
        tier = self._tiers.get(rows, self._widest)
        self._put(tier)
        try:
            yield
        finally:
            self._put(self._widest)

    def _put(self, tier: _Tier) -> None:
        self.runner.attn_backend = tier.backend
        self.runner.decode_cuda_graph_runner = tier.graphs


@contextmanager
def no_tiers(rows: int) -> Iterator[None]:
    """Where no graphs are captured every width is as good as another."""
    yield


Tiers = Callable[[int], AbstractContextManager[None]]
