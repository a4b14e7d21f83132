"""Every test of an operation runs on each implementation this process can run.

A plain run tests the torch implementations, and `test_interpreter.py` starts this same directory once more
under TRITON_INTERPRET=1, where the Triton kernels are tested instead. With a CUDA device both run in place.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from dflash_kernels._dispatch import interpreting
from hypothesis import HealthCheck, settings
from kernel_seed import SEED

os.environ["DFLASH_TEST_SEED"] = str(SEED)  # for the interpreter's process
settings.register_profile(
    "kernels",
    deadline=None,
    max_examples=25 if interpreting() else 60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("kernels")


@dataclass(frozen=True)
class Backend:
    """One implementation of every operation and the device its tensors live on."""

    name: str
    device: str
    build_tree: object
    accept_tree: object
    compact: object
    tree_attention: object
    draft_topk: object
    race_noise: object
    race_argmax: object
    recall: object


def _torch_backend(device: str) -> Backend:
    from dflash_kernels.gumbel.reference import race_argmax_torch, race_noise_torch
    from dflash_kernels.head_topk.reference import draft_topk_torch
    from dflash_kernels.kv_compact.reference import compact_kv_torch
    from dflash_kernels.recall.reference import recall_torch
    from dflash_kernels.tree_accept.reference import accept_tree_torch
    from dflash_kernels.tree_attn.reference import tree_attention_torch
    from dflash_kernels.tree_build.reference import build_tree_torch

    return Backend(
        "torch",
        device,
        build_tree_torch,
        accept_tree_torch,
        compact_kv_torch,
        tree_attention_torch,
        draft_topk_torch,
        race_noise_torch,
        race_argmax_torch,
        recall_torch,
    )


def _triton_backend(device: str) -> Backend:
    from dflash_kernels.gumbel.kernel import race_argmax_triton, race_noise_triton
    from dflash_kernels.head_topk.kernel import draft_topk_triton
    from dflash_kernels.kv_compact.kernel import PointerTable, compact_kv_triton
    from dflash_kernels.recall.kernel import recall_triton
    from dflash_kernels.tree_accept.kernel import accept_tree_triton
    from dflash_kernels.tree_attn.kernel import tree_attention_triton
    from dflash_kernels.tree_build.kernel import build_tree_triton

    def compact(caches, slots, path, accept_lens):
        compact_kv_triton(PointerTable(caches), slots, path, accept_lens)

    return Backend(
        "triton",
        device,
        build_tree_triton,
        accept_tree_triton,
        compact,
        tree_attention_triton,
        draft_topk_triton,
        race_noise_triton,
        race_argmax_triton,
        recall_triton,
    )


def _backends() -> list[str]:
    if interpreting():
        return ["triton"]
    return ["torch", "triton"] if torch.cuda.is_available() else ["torch"]


@pytest.fixture(scope="session", params=_backends())
def backend(request: pytest.FixtureRequest) -> Backend:
    device = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"
    make = {"torch": _torch_backend, "triton": _triton_backend}
    return make[request.param](device)


@pytest.fixture(autouse=True)
def _fresh_inputs() -> None:
    """New random inputs in every run; the header names the seed that repeats one."""
    torch.manual_seed(SEED)


def pytest_report_header(config: pytest.Config) -> str:
    return f"kernel tests: backends {_backends()}, DFLASH_TEST_SEED={SEED}"
