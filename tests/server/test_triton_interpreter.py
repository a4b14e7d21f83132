"""The Triton path end to end in the interpreter: same tokens as plain decoding on the torch path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.server.support import Client, dflash_args, tiny_args
from tests.server.test_paths import requests_for

pytestmark = [pytest.mark.server, pytest.mark.slow]


ALONE = ["--attention-backend", "triton"]
# As `plugin/start.py` composes them on CUDA, with fa3 or flashinfer in the first place.
BESIDE = [
    *("--prefill-attention-backend", "dflash_cpu", "--decode-attention-backend", "triton"),
    *("--speculative-attention-mode", "decode"),
]


@pytest.mark.parametrize(
    ("flags", "attention"),
    [
        pytest.param(ALONE, "TritonAttnBackend", id="alone"),
        pytest.param(BESIDE, "CpuAttentionBackend, TritonAttnBackend", id="beside"),
        pytest.param([*BESIDE, "--page-size", "64"], "CpuAttentionBackend, TritonAttnBackend", id="pages"),
    ],
)
def test_tree_server_on_interpreted_kernels(
    launch: Callable[..., Client], tiny_pair: tuple[Path, Path], flags: list[str], attention: str
) -> None:
    target, drafter = tiny_pair
    requests = requests_for(3, 8, seed=5)
    plain = launch("plain", tiny_args(target))
    want = [reply["output_ids"] for reply in plain.generate(requests, 1, ignore_eos=True)]
    backend = [*flags, "--speculative-draft-attention-backend", "triton"]
    tree = launch("interpreted", tiny_args(target, *dflash_args(drafter, 12), *backend), TRITON_INTERPRET="1")
    info = tree.info()
    assert info.marker is not None
    assert info.marker.model_dump()["attention"] == attention
    got = [reply["output_ids"] for reply in tree.generate(requests, 3, ignore_eos=True)]
    assert got == want
