"""The width stage of a server, at start: what ``SGLANG_DFLASH_WIDTH`` asks for, and what that needs."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sglang_dflash.step.width import PLAIN, Width
from sglang_dflash.upstream.rehearsal import room
from sglang_dflash.worker.width.control import CONTROL, ControlledWidth
from sglang_dflash.worker.width.cost import CostTable, load
from sglang_dflash.worker.width.gain import Gains
from sglang_dflash.worker.width.learn import SECONDS_CPU, SECONDS_CUDA, measure_costs
from sglang_dflash.worker.width.policy import FixedWidth, WidthPolicy, make_policy
from sglang_dflash.worker.width.stage import WidthStage
from sglang_dflash.worker.width.tiers import TIERS, tiers_up_to

if TYPE_CHECKING:
    from sglang_dflash.worker.worker import TreeWorker

logger = logging.getLogger("sglang_dflash")


def tiers_asked(setting: str) -> Sequence[int]:
    """Numbers of nodes of which a step's report says what the drafter expected; none where nobody learns."""
    return TIERS if setting == "auto" or setting.startswith(CONTROL) else ()


def start_width(setting: str, worker: TreeWorker) -> WidthStage:
    """The stage, its cost table filled, and on CUDA a graph for every width that it may choose.

    Args:
        setting: of ``SGLANG_DFLASH_WIDTH``.
        worker: with pools, backends and SGLang's own graphs ready.
    """
    widest, bridge = worker.max_width, worker.bridge
    if setting != "auto" and not setting.startswith(CONTROL):
        pinned = make_policy(setting, widest)
        if isinstance(pinned, FixedWidth):
            bridge.capture_tiers([pinned.width.nodes], [pinned.width.block])
            _compile(worker, [pinned.width])
        else:
            _compile(worker, every_width(widest))
        return WidthStage(pinned, widest)
    share = bridge.share_or_none()
    captured = bridge.capture_tiers(tiers_up_to(widest.nodes), range(2, widest.block))
    _compile(worker, every_width(widest))
    cost = load(bridge.fingerprint(), captured=captured, shared=share is not None)
    file = Path(setting.removeprefix(CONTROL))
    if cost is None:
        cost = CostTable(captured=captured, shared=share is not None)
        # A file that pins the width at start is a test's: nobody waits for a table that it may never ask for.
        if setting == "auto" or not file.is_file() or file.read_text().strip() == "auto":
            _measure(cost, worker)
    known = worker.drafter_config.dflash_config
    gains = Gains(
        widest.block,
        known.tree_accept,
        known.tree_accept_sampled,
        recalled=0 if worker.recall is None else worker.recall.deepest,
    )
    auto = WidthPolicy(widest, cost, gains)
    if setting == "auto":
        return WidthStage(auto, widest, share=share)
    return WidthStage(ControlledWidth(file, auto, lambda text: make_policy(text, widest)), widest)


def every_width(widest: Width) -> list[Width]:
    """Every width that may be chosen, the greatest last."""
    tiers = tiers_up_to(widest.nodes)
    drafted = [Width(n, b) for n in tiers if n > 1 for b in range(2, min(widest.block, n) + 1)]
    return [PLAIN, *drafted, *([] if widest in drafted else [widest])]


def to_compile(widths: Sequence[Width], most_requests: int) -> list[tuple[Width, int, bool]]:
    """Steps (width, requests, sampled) that between them launch every kernel of steps of ``widths``.

    Machine code follows the nodes and the block, whether requests sample, and how many rows the drafter's
    head has: up to 16, up to 32, or more (``head_topk``).
    """
    steps = [(width, 1, False) for width in widths]
    last = widths[-1]
    for rows in (1, 17, 33):
        requests = min(most_requests, -(-rows // max(last.block - 1, 1)))
        steps += [(last, requests, sampled) for sampled in (False, True)]
    return steps


def _compile(worker: TreeWorker, widths: Sequence[Width]) -> None:
    """Where Triton serves: compile what steps of ``widths`` launch, lest a request waits for the compiler."""
    if not worker.bridge.compiles():
        return
    begin = time.perf_counter()
    most_requests, longest = room(worker.bridge.target, worker.max_width.slots)
    steps = to_compile(widths, most_requests)
    for width, requests, sampled in steps:
        worker.rehearse(width, requests, min(64, longest), sampled=sampled)
    logger.info("sglang-dflash: %d steps rehearsed in %.1f s", len(steps), time.perf_counter() - begin)


def _measure(cost: CostTable, worker: TreeWorker) -> None:
    bridge, widest = worker.bridge, worker.max_width
    most_requests, longest = room(bridge.target, widest.slots)
    measure_costs(
        cost,
        worker.rehearse,
        widest,
        most_requests=most_requests,
        longest=longest,
        seconds=SECONDS_CUDA if torch.device(bridge.device).type == "cuda" else SECONDS_CPU,
        fingerprint=bridge.fingerprint(),
        agree=bridge.share_or_none(),
    )
