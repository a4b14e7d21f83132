"""The Triton path end to end in the interpreter: same tokens as plain decoding on the torch path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.server.support import Client, dflash_args, tiny_args
from tests.server.test_paths import requests_for

pytestmark = [pytest.mark.server, pytest.mark.slow]


def test_tree_server_on_interpreted_kernels(
    launch: Callable[..., Client], tiny_pair: tuple[Path, Path]
) -> None:
    target, drafter = tiny_pair
    requests = requests_for(3, 8, seed=5)
    plain = launch("plain", tiny_args(target))
    want = [reply["output_ids"] for reply in plain.generate(requests, 1, ignore_eos=True)]
    backend = ["--attention-backend", "triton", "--speculative-draft-attention-backend", "triton"]
    tree = launch("interpreted", tiny_args(target, *dflash_args(drafter, 12), *backend), TRITON_INTERPRET="1")
    info = tree.info()
    assert info.marker is not None
    assert info.marker.model_dump()["attention"] == "TritonAttnBackend"
    got = [reply["output_ids"] for reply in tree.generate(requests, 3, ignore_eos=True)]
    assert got == want
