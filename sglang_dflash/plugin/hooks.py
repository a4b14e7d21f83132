"""The hooks on SGLang, one function each, and the proof that they are in place.

Every target is a light module: SGLang imports a hook's target in every process that loads
plugins, the HTTP front end included.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

from sglang_dflash import __version__
from sglang_dflash.drafter import block_size_of
from sglang_dflash.errors import UserError
from sglang_dflash.plugin import mode
from sglang_dflash.settings import get_settings
from sglang_dflash.step.width import Width

logger = logging.getLogger("sglang_dflash")

CREATE_WORKER = "sglang.srt.speculative.spec_info.SpeculativeAlgorithm.create_worker"
HANDLE_DFLASH = "sglang.srt.arg_groups.speculative_hook._handle_dflash"
RESOLVE_ALIAS = "sglang.srt.arg_groups.speculative_hook._resolve_speculative_algorithm_alias"
ROW_HEADROOM = "sglang.srt.mem_cache.allocation_sizing.get_req_to_token_extra_context_len"
ALLOC_LENS = "sglang.srt.mem_cache.allocation_sizing.page_aligned_decode_alloc_lens"
DECODE_RESERVE = "sglang.srt.mem_cache.allocation_sizing.get_alloc_reserve_per_decode"
SERVER_INFO = (
    "sglang.srt.managers.scheduler_components.internal_state."
    "SchedulerInternalStateController._add_speculative"
)
CHECK_DECODE_MEM = "sglang.srt.managers.schedule_batch.ScheduleBatch.check_decode_mem"
SCHEDULER_TRACEBACK = "sglang.srt.managers.scheduler.get_exception_traceback"

PUBLISH = "sglang.srt.runtime_context.publish"
SET_RANDOM_SEED = "sglang.srt.utils.common.set_random_seed"
_BATCH_INFO = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo"
_SAMPLE_FROM_PROBS = "sglang.srt.layers.sampler.Sampler._sample_from_probs"
_GENERATE_REQ = "sglang.srt.managers.io_struct.GenerateReqInput"
_SCHEDULE_BATCH = "sglang.srt.managers.schedule_batch.ScheduleBatch"
_SESSION = "sglang.srt.session.session_controller.Session"
_KEEP_TURN = "sglang.srt.session.streaming_session.StreamingSession.try_cache_finished_req"
_FINISHED = (
    "sglang.srt.managers.scheduler_components.batch_result_processor."
    "SchedulerBatchResultProcessor._handle_finish_state_updated_req"
)
_VALIDATE = "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request"


def create_worker(original: Callable, self: Any, server_args: Any) -> Any:
    """AROUND ``SpeculativeAlgorithm.create_worker``: the tree worker for DFLASH, in the scheduler."""
    if not self.is_dflash():
        return original(self, server_args)
    from sglang.srt.plugins.hook_registry import HookType

    _install(
        {
            SERVER_INFO: (server_info, HookType.AFTER),
            SCHEDULER_TRACEBACK: (scheduler_traceback, HookType.AROUND),
            CHECK_DECODE_MEM: (check_decode_mem, HookType.AROUND),
        }
    )
    verify_installed()
    decision = mode.decided()
    if decision.mode == "chain":
        from sglang_dflash.worker.banner import announce_chain

        announce_chain(decision.reason)
        return original(self, server_args)
    _follow_transfers()
    from sglang_dflash.worker.worker import TreeWorker

    return TreeWorker


def _follow_transfers() -> None:
    """On a decode server of prefill/decode disaggregation: requests come in without a prefill pass."""
    from sglang.srt.plugins.hook_registry import HookType
    from sglang.srt.runtime_context import get_disagg

    if get_disagg().disaggregation_mode != "decode":
        return
    from sglang_dflash.upstream import contract, handover

    contract.check_handover()
    _install({handover.PREBUILT: (handover.remember_transferred, HookType.AFTER)})


def handle_dflash(original: Callable, server_args: Any) -> Any:
    """AROUND ``_handle_dflash``: drafter check, who decodes and the default budget, in the parent."""
    if get_settings().mode == "chain":
        mode.decide(mode.OFF_SWITCH)
        return original(server_args)
    verify_installed()
    from sglang_dflash.plugin.start import check_start, keep_room, leave_out_drafter

    check_start(server_args)
    if mode.decided().mode == "plain":
        return leave_out_drafter(server_args)
    with keep_room(server_args):
        return original(server_args)


def resolve_alias(
    original: Callable,
    speculative_algorithm: Any,
    speculative_draft_model_path: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """AROUND ``_resolve_speculative_algorithm_alias``: DFLASH has no alias.

    SGLang would open the drafter for that, whatever its revision, and end in a traceback where it is not
    there; ``handle_dflash`` opens the right one and says what is wrong in one line.
    """
    mode.forget()
    if str(speculative_algorithm).upper() == "DFLASH":
        return "DFLASH"
    return original(speculative_algorithm, speculative_draft_model_path, *args, **kwargs)


def _tree_spec() -> Any | None:
    """The published speculative settings when our tree worker serves, else None."""
    from sglang.srt.runtime_context import get_spec

    spec = get_spec()
    if spec.speculative_algorithm != "DFLASH" or mode.decided().mode == "chain":
        return None
    return spec


def greatest_reserve(spec: Any) -> int:
    """KV slots a request may hold past its committed length, in tokens, whatever the widths.

    A step writes max(N, B) slots from the device's length on; the host's committed length lags by what
    the step in flight can commit, N tokens where a recalled path uses the whole tree. SGLang reserves 2N,
    which for N < B leaves the draft block writing slots of nobody or of another request.
    """
    widest = Width(int(spec.speculative_num_draft_tokens), block_size_of(spec))
    return widest.most + widest.slots


def round_reserve(spec: Any) -> int:
    """The reserve of the scheduling round's step, whose width is chosen (``worker/width``)."""
    from sglang_dflash.worker.width import serving

    stage = serving()
    return greatest_reserve(spec) if stage is None else stage.reserve()


def check_decode_mem(original: Callable, self: Any, selected_indices: list[int] | None = None) -> bool:
    """AROUND ``ScheduleBatch.check_decode_mem``: a round begins with its width, which memory can narrow.

    With ``selected_indices`` SGLang asks again while it retracts requests.
    """
    from sglang_dflash.upstream.requests import sampled_share
    from sglang_dflash.worker.width import serving

    stage = serving()
    if stage is None or selected_indices is not None:
        return original(self, selected_indices)
    stage.begin(len(self.reqs), sampled_share(self))
    return original(self) or (stage.narrow() and original(self))


def row_headroom(original: Callable) -> int:
    """AROUND ``get_req_to_token_extra_context_len``: room in the request's row for the reserve.

    At page size 1 SGLang leaves 4 + N entries past the context length but writes 2N of them.
    """
    extra = original()
    spec = _tree_spec()
    if spec is None:
        return extra
    from sglang.srt.mem_cache.allocation_sizing import get_alloc_page_size

    return max(extra, 4 + greatest_reserve(spec) + get_alloc_page_size() - 1)


def decode_reserve_per_request(original: Callable) -> int:
    """AROUND ``get_alloc_reserve_per_decode``: the scheduler checks for the room that is then taken."""
    spec = _tree_spec()
    if spec is None:
        return original()
    return round_reserve(spec)


def alloc_lens(original: Callable, reqs: Any, *, reserve: int, page_size: int) -> Any:
    """AROUND ``page_aligned_decode_alloc_lens``: the reserve of one decode step."""
    spec = _tree_spec()
    if spec is not None:
        reserve = round_reserve(spec)
    return original(reqs, reserve=reserve, page_size=page_size)


def server_info(result: None, self: Any, state: dict[str, Any]) -> None:
    """AFTER ``_add_speculative``: names the worker really in use in ``/server_info``."""
    if mode.decided().mode == "plain":
        state["dflash"] = {
            "plugin": __version__,
            "mode": "plain",
            "worker": "SGLang without the drafter",
            **mode.why(),
        }
    if not self.scheduler.spec_algorithm.is_dflash():
        return
    worker = self.scheduler.draft_worker
    describe = getattr(worker, "describe", None)
    state["dflash"] = {
        "plugin": __version__,
        "mode": "tree" if describe else "chain",
        "worker": f"{type(worker).__module__}.{type(worker).__qualname__}",
        **(describe() if describe else mode.why()),
    }


def scheduler_traceback(original: Callable) -> str:
    """AROUND the scheduler's ``get_exception_traceback``: our own refusals are one line, not a traceback."""
    error = sys.exc_info()[1]
    return f"sglang-dflash: {error}" if isinstance(error, UserError) else original()


def publish(result: Any, server_args: Any, *args: Any, role: str, **kwargs: Any) -> None:
    """AFTER ``publish``: SGLang says which process this is; the seeded sampler goes into two of them,
    mends into the scheduler, the check of prompts into the one that takes requests.

    Their targets cost seconds to import in a process that would not need them. SGLang's own chain keeps
    SGLang's own sampler.
    """
    if mode.decided().mode == "chain":
        return
    from sglang.srt.plugins.hook_registry import HookType

    from sglang_dflash.upstream import contract

    if role == "scheduler":
        contract.check_scheduler()
        _install(_sampler_table() | _scheduler_table())
        if mode.decided().mode == "plain":
            _install({SERVER_INFO: (server_info, HookType.AFTER)})
    elif role == "tokenizer":
        contract.check_front_end()
        _install(_front_end_table())


def set_random_seed(result: None, seed: int) -> None:
    """AFTER ``set_random_seed``: the scheduler's, as broadcast to all ranks."""
    from sglang_dflash.upstream.sampler import SEEDS

    SEEDS.server_seed = seed


def _sampler_table() -> dict[str, tuple[Callable, Any]]:
    """Hooks of the scheduler process, see ``upstream/sampler.py``."""
    from sglang.srt.plugins.hook_registry import HookType

    from sglang_dflash.upstream import sampler

    return {
        f"{_BATCH_INFO}.adjusted_from_schedule_batch": (
            lambda result, info, batch, vocab_size: sampler.attach_seeds(info, batch),
            HookType.AFTER,
        ),
        f"{_BATCH_INFO}.adjusted_merge_batch": (
            lambda result, info, other: sampler.merge_seeds(info, other),
            HookType.AFTER,
        ),
        f"{_BATCH_INFO}.adjusted_filter_batch": (
            lambda result, info, keep, keep_on_device: sampler.filter_seeds(info, keep_on_device),
            HookType.AFTER,
        ),
        f"{_BATCH_INFO}.copy_for_forward": (sampler.copy_seeds, HookType.AFTER),
        _SAMPLE_FROM_PROBS: (sampler.sample_from_probs, HookType.AROUND),
    }


def _scheduler_table() -> dict[str, tuple[Callable, Any]]:
    """Mends of every scheduler, plain ones included."""
    from sglang.srt.plugins.hook_registry import HookType

    from sglang_dflash.upstream import embeds, sessions, usage

    return {
        f"{_SCHEDULE_BATCH}.prepare_for_extend": (embeds.spread_embeds, HookType.AFTER),
        f"{_SESSION}.create_req": (sessions.detach_refused, HookType.AFTER),
        _KEEP_TURN: (sessions.keep_written_keys, HookType.AROUND),
        _FINISHED: (usage.trim_reasoning, HookType.BEFORE),
    }


def _front_end_table() -> dict[str, tuple[Callable, Any]]:
    """Hooks of the process that takes requests."""
    from sglang.srt.plugins.hook_registry import HookType

    from sglang_dflash.upstream import prompts, sampler

    return {
        _VALIDATE: (prompts.validate_one_request, HookType.AROUND),
        f"{_GENERATE_REQ}.__getitem__": (
            lambda prompt, batch, i: sampler.attach_counter(prompt, batch),
            HookType.AFTER,
        ),
        f"{_GENERATE_REQ}._validate_inputs": (prompts.validate_inputs, HookType.AROUND),
        f"{_GENERATE_REQ}.regenerate_rid": (sampler.number_sample, HookType.AROUND),
    }


def _table() -> dict[str, tuple[Callable, Any]]:
    from sglang.srt.plugins.hook_registry import HookType

    return {
        CREATE_WORKER: (create_worker, HookType.AROUND),
        HANDLE_DFLASH: (handle_dflash, HookType.AROUND),
        RESOLVE_ALIAS: (resolve_alias, HookType.AROUND),
        ROW_HEADROOM: (row_headroom, HookType.AROUND),
        DECODE_RESERVE: (decode_reserve_per_request, HookType.AROUND),
        ALLOC_LENS: (alloc_lens, HookType.AROUND),
        PUBLISH: (publish, HookType.AFTER),
        SET_RANDOM_SEED: (set_random_seed, HookType.AFTER),
    }


def register_all() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    for target, (hook, kind) in _table().items():
        HookRegistry.register(target, hook, kind)


def _install(table: dict[str, tuple[Callable, Any]]) -> None:
    """Hooks whose targets cost up to 20 s to import: only in the process that imports them anyway."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    fresh = [target for target in table if target not in HookRegistry._patched]
    for target in fresh:
        HookRegistry.register(target, *table[target])
    if fresh:
        HookRegistry.apply_hooks()
    failed = [target for target in table if target not in HookRegistry._patched]
    if failed:
        raise SystemExit(
            f"sglang-dflash: SGLang did not apply the hook on {failed[0]}; run `sglang-dflash doctor`, "
            "or set SGLANG_DFLASH_MODE=chain to go without."
        )


def missing() -> list[str]:
    """Targets on which our hook is registered but not in force."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    return [
        target
        for target, (hook, _) in _table().items()
        if target not in HookRegistry._patched
        or hook not in [registered for _, registered, _ in HookRegistry._hooks[target]]
    ]


def verify_installed() -> None:
    """Stop when a hook was not applied: SGLang only logs that and would serve the chain."""
    absent = missing()
    if absent:
        raise SystemExit(
            f"sglang-dflash: SGLang did not apply the hook on {absent[0]}; the chain would run unnoticed. "
            "Run `sglang-dflash doctor`, or set SGLANG_DFLASH_MODE=chain to use the built-in worker."
        )
