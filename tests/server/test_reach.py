"""Drafters in layouts other than z-lab's first, started for real."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import field, tiny
from tests.server.support import Client, Request, Serving, dflash_args, tiny_args

pytestmark = pytest.mark.server

REQUESTS = [Request(tuple(tiny.tokens_of(text)), 40) for text in (b"a prompt", b"another one, longer")]


@pytest.mark.slow
def test_a_windowed_anchor_first_drafter_with_flat_keys(
    serving: Serving, tiny_pair: tuple[Path, Path], tiny_plain: Client, tmp_path: Path
) -> None:
    """Bidirectional sliding layers, every key at the top level, rows that predict the next token."""
    target, _ = tiny_pair
    spec = tiny.TargetSpec(tie_word_embeddings=False)
    folder = tiny.build_drafter(tmp_path / "drafter", spec)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config |= config.pop("dflash_config") | {
        "sample_from_anchor": True,
        "is_causal": False,
        "layer_types": ["sliding_attention"] * 2,
        "sliding_window": 16,
        "use_sliding_window": True,
        "vocab_size": spec.vocab_size + 4,
        "num_target_layers": spec.num_layers + 1,
    }
    file.write_text(json.dumps(config))
    with serving("reach", tiny_args(target, *dflash_args(folder, 8))) as client:
        marker = client.info().marker
        assert marker is not None
        assert marker.mode == "tree"
        got = client.generate(REQUESTS, 2)
    want = tiny_plain.generate(REQUESTS, 2)
    assert [reply["output_ids"] for reply in got] == [reply["output_ids"] for reply in want]


@pytest.mark.slow
def test_the_published_drafter_that_trees_serve(
    serving: Serving, tiny_pair: tuple[Path, Path], tiny_plain: Client, tmp_path: Path
) -> None:
    """Qwen3-4B-DFlash-b16's keys over the tiny target: a block of 16, five layers."""
    target, _ = tiny_pair
    published = next(entry for entry in field.ENTRIES if entry["name"] == "Qwen3-4B-DFlash-b16")["config"]
    section = {**published["dflash_config"], "target_layer_ids": [0, 1, 2]}
    folder = field.build_drafter(
        tmp_path / "drafter", {**published, "dflash_config": section, "num_target_layers": 4}, 4
    )
    with serving("published", tiny_args(target, *dflash_args(folder))) as client:
        marker = client.info().marker
        assert marker is not None
        assert (marker.mode, (marker.model_extra or {})["block_size"]) == ("tree", 16)
        got = client.generate(REQUESTS, 2)
    want = tiny_plain.generate(REQUESTS, 2)
    assert [reply["output_ids"] for reply in got] == [reply["output_ids"] for reply in want]


@pytest.mark.slow
def test_where_trees_cannot_serve_a_cpu_decodes_plainly(
    serving: Serving, tiny_pair: tuple[Path, Path], tiny_plain: Client
) -> None:
    target, drafter = tiny_pair
    args = tiny_args(target, *dflash_args(drafter), "--speculative-draft-window-size", "64")
    with serving("windowed", args) as client:
        marker = client.info().marker
        assert marker is not None
        assert (marker.mode, marker.reason) == ("plain", "a drafter window")
        got = client.generate(REQUESTS, 2)
        lines = [line for line in client.server.output().splitlines() if "draft trees do not serve" in line]
    assert len(lines) == 1
    assert lines[0].endswith("for trees leave out --speculative-draft-window-size")
    want = tiny_plain.generate(REQUESTS, 2)
    assert [reply["output_ids"] for reply in got] == [reply["output_ids"] for reply in want]


@pytest.mark.slow
def test_a_selector_drafter_with_convolutions(
    serving: Serving, tiny_pair: tuple[Path, Path], tiny_plain: Client, tmp_path: Path
) -> None:
    """Qwen3.8-27B-DFlash2's layout over the tiny target, its tables and kernels random and not zero."""
    target, _ = tiny_pair
    published = next(entry for entry in field.ENTRIES if entry["name"] == "Qwen3.8-27B-DFlash2")["config"]
    section = {**published["dflash_config"], "target_layer_ids": [0, 1, 2], "conv_group_size": 16}
    folder = field.build_drafter(
        tmp_path / "drafter", {**published, "dflash_config": section, "num_target_layers": 4}, 4
    )
    file = folder / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    weights = load_file(file)
    for name, weight in weights.items():
        if "selector" in name or "conv" in name:
            noise = torch.randn(weight.shape, generator=generator) * (1.0 if "selector" in name else 0.1)
            weights[name] = (weight.float() + noise).to(weight.dtype)
    save_file(weights, file)
    requests = [Request(tuple(range(3 + i, 30 + i)), 40) for i in range(6)]
    with serving("selector", tiny_args(target, *dflash_args(folder, 12))) as client:
        marker = client.info().marker
        assert marker is not None
        assert marker.mode == "tree"
        want = tiny_plain.generate(requests, 2, ignore_eos=True)
        for setting in ("fixed", "random:4"):
            with client.width(setting):
                got = client.generate(requests, 3, ignore_eos=True)
            assert [reply["output_ids"] for reply in got] == [reply["output_ids"] for reply in want]
        seeded = {"temperature": 0.8, "sampling_seed": 11, "ignore_eos": True}
        sampled = [reply["output_ids"] for reply in client.generate(requests, 3, **seeded)]
        assert sampled == [reply["output_ids"] for reply in tiny_plain.generate(requests, 2, **seeded)]
        assert client.info().marker.model_extra["drafter_fallbacks"] == 0  # type: ignore[union-attr,index]
