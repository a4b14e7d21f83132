"""The installed SGLang still has what the plugin relies on, by name and parameter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sglang_dflash.errors import UserError
from sglang_dflash.plugin import hooks
from sglang_dflash.upstream import contract, handover


def test_light_contract_holds() -> None:
    assert contract.broken(contract.LIGHT) == []


def test_worker_contract_holds() -> None:
    assert contract.broken(contract.WORKER) == []


def test_reading_contract_holds() -> None:
    assert contract.broken(contract.READING) == []


def test_scheduler_and_front_end_contract_holds() -> None:
    assert contract.broken(contract.SAMPLER | contract.SCHEDULER | contract.FRONT_END) == []


def test_handover_contract_holds() -> None:
    assert contract.broken(contract.HANDOVER) == []


def test_tiers_contract_holds() -> None:
    assert contract.broken(contract.TIERS) == []


def test_triton_seam_holds() -> None:
    assert contract.broken(contract.TRITON) == []


def test_every_hooked_function_is_under_contract() -> None:
    hooked = {*hooks._table(), hooks.SERVER_INFO, hooks.SCHEDULER_TRACEBACK, hooks.CHECK_DECODE_MEM}
    assert hooked <= set(contract.LIGHT) | set(contract.WORKER)
    assert set(hooks._sampler_table()) <= set(contract.SAMPLER)
    assert set(hooks._scheduler_table()) <= set(contract.SCHEDULER)
    assert set(hooks._front_end_table()) <= set(contract.FRONT_END)
    assert handover.PREBUILT in contract.HANDOVER


def test_a_lost_parameter_and_a_lost_name_are_named() -> None:
    table = {
        "sglang.srt.mem_cache.allocation_sizing.page_aligned_decode_alloc_lens": ("reqs", "colour"),
        "sglang.srt.mem_cache.allocation_sizing.no_such_function": (),
    }
    first, second = contract.broken(table)
    assert first.endswith("page_aligned_decode_alloc_lens has no parameter colour")
    assert "no_such_function is gone" in second
    with pytest.raises(UserError, match=r"not the release this plugin was made for \(0\.5\.23\)"):
        contract._raise_if_broken(table)


def test_reserve_covers_both_widths() -> None:
    # The host's length lags by the step in flight; each step writes max(N, B) slots.
    for nodes in (2, 4, 8, 16, 64):
        spec = SimpleNamespace(speculative_num_draft_tokens=nodes, speculative_dflash_block_size=8)
        assert hooks.greatest_reserve(spec) == nodes + max(nodes, 8)


def test_our_own_refusals_are_no_traceback() -> None:
    try:
        raise UserError("draft trees need this; do that")
    except UserError:
        assert hooks.scheduler_traceback(lambda: "Traceback") == (
            "sglang-dflash: draft trees need this; do that"
        )
    try:
        raise KeyError("a bug")
    except KeyError:
        assert hooks.scheduler_traceback(lambda: "Traceback") == "Traceback"
