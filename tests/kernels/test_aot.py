"""Every listed specialisation compiles for its architecture, without a GPU, to code worth launching."""

from __future__ import annotations

import pytest
from dflash_kernels._dispatch import interpreting

if interpreting():
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from kernel_aot import SHARED_PER_BLOCK, Spec, compile_spec
from kernel_specs import FAST, REST

# wgmma on Hopper, tcgen05 on Blackwell, mma.sync for tiles of fewer than 64 rows and on Ampere.
TENSOR_CORE = {"HGMMA", "UTCHMMA", "HMMA"}


def check(spec: Spec) -> None:
    got = compile_spec(spec)
    assert got.spill_bytes == 0, f"{spec.name} spills {got.spill_bytes} bytes at {got.registers} registers"
    assert got.shared <= SHARED_PER_BLOCK[spec.arch], f"{spec.name} wants {got.shared} bytes of shared memory"
    if spec.tensor_core:
        assert TENSOR_CORE & got.opcodes, f"{spec.name} has no tensor-core instruction: {sorted(got.opcodes)}"
    if spec.per_sm is not None:
        fits = got.per_sm(spec.arch, spec.options["num_warps"])
        assert fits >= spec.per_sm, f"{spec.name}: the plan counts on {spec.per_sm} per SM, {fits} fit"


@pytest.mark.parametrize("spec", FAST, ids=lambda s: s.name)
def test_listed(spec):
    check(spec)


@pytest.mark.slow
@pytest.mark.parametrize("spec", REST, ids=lambda s: s.name)
def test_rest(spec):
    check(spec)


def test_hopper_row_tiles_of_64_use_wgmma():
    spec = next(s for s in FAST if s.name == "prefix-sm90-dim128-rows64")
    assert "HGMMA" in compile_spec(spec).opcodes


def test_the_prefix_loop_copies_ahead():
    """Rows arrive by asynchronous copies into at least two buffers besides the one in use."""
    spec = next(s for s in FAST if s.name == "prefix-sm90-dim128-rows64")
    got = compile_spec(spec)
    assert "LDGSTS" in got.opcodes
    tile = spec.constants["BN"] * (spec.constants["DK"] + spec.constants["DV"]) * 2
    assert got.shared >= 3 * tile


def test_the_head_streams_its_weights():
    """Asynchronous copies need the hint that H is a multiple of 16; without them every load would stall."""
    got = compile_spec(next(s for s in FAST if s.name == "topk-sm90-rows64-k16"))
    assert "LDGSTS" in got.opcodes


def test_the_spill_check_can_fail():
    """A tile far too large for its warps is reported, so a silent zero would show."""
    import dataclasses

    spec = next(s for s in FAST if s.name == "prefix-sm80-dim256-rows64-fused")
    big = dataclasses.replace(
        spec,
        constants={**spec.constants, "BM": 128},
        options={"num_warps": 4, "num_stages": 2},
    )
    assert compile_spec(big).spill_bytes > 0
