"""Our reading of a drafter's config against SGLang's own, over where its keys can stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.models import dflash, lilicorr
from sglang.srt.runtime_context import get_parallel
from sglang.srt.speculative.dflash_utils import parse_dflash_draft_config
from sglang.srt.utils.hf_transformers_utils import get_config

from sglang_dflash.drafter import DrafterConfig
from sglang_dflash.drafter.expected import FUSED, wanted
from sglang_dflash.drafter.kinds import DFLASH_CLASSES
from tests import field

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "block_size": st.integers(2, 32),
    "mask_token_id": st.integers(0, 511),
    "num_target_layers": st.integers(4, 40),
    "target_layer_ids": st.lists(st.integers(0, 3), min_size=1, max_size=4),
    "projector_type": st.just("plain"),
}
KEYS = st.fixed_dictionaries({}, optional={name: st.none() | value for name, value in VALUES.items()})


@settings(max_examples=300)
@given(top=KEYS, section=st.none() | KEYS)
def test_the_same_values_from_the_same_places(top: dict[str, Any], section: dict[str, Any] | None) -> None:
    raw = {"hidden_size": 64, "num_hidden_layers": 2, **top}
    if section is not None:
        raw["dflash_config"] = section
    theirs = parse_dflash_draft_config(draft_hf_config=raw)
    ours = DrafterConfig.model_validate(raw)
    for name in VALUES:
        assert getattr(ours.dflash_config, name) == getattr(theirs, name), name
    assert ours.block == theirs.resolve_block_size(default=16)


def test_feature_layers_by_default_go_by_the_target() -> None:
    raw = {"hidden_size": 64, "num_hidden_layers": 2, "num_target_layers": 41}
    theirs = parse_dflash_draft_config(draft_hf_config=raw).resolve_target_layer_ids(target_num_layers=40)
    assert DrafterConfig.model_validate(raw).target_layers(40) == theirs == [1, 37]


def test_the_classes_are_sglangs() -> None:
    names = {entry.__name__ for entry in dflash.EntryClass}
    assert names | {entry.__name__ for entry in lilicorr.EntryClass} == DFLASH_CLASSES


@pytest.mark.parametrize("entry", field.ENTRIES, ids=lambda entry: entry["name"].replace(" ", "-"))
def test_the_tensors_are_those_of_sglangs_class(entry: dict[str, Any], tmp_path: Path) -> None:
    """Every parameter SGLang makes for a published config is one we look for, and no other."""
    config = entry["config"]
    if not DFLASH_CLASSES.intersection(config["architectures"]):
        pytest.skip("not a class of DFLASH")
    left_out = {"model_type": "qwen3", "use_sliding_window": True, "num_target_layers": 64, "emb_dim": 8}
    if "projector" in str(config):
        left_out |= {"shift_label": True, "pure_draft_prefix_len": 1}
    folder = field.build_drafter(tmp_path, config, 64, **left_out)
    ours = DrafterConfig.model_validate_json((folder / "config.json").read_text())
    names = {want.name for want in wanted(ours, len(ours.target_layers(64)))}
    assert names == _fused_apart(_parameters(folder))


def _parameters(folder: Path) -> set[str]:
    """The parameters of SGLang's own class, made without memory."""
    config = get_config(str(folder), trust_remote_code=False)
    cls = next(entry for entry in dflash.EntryClass if entry.__name__ in config.architectures)
    alone = get_parallel().override(tp_size=1, tp_rank=0, attn_tp_size=1, attn_tp_rank=0)
    with alone, torch.device("meta"):
        return {name for name, _ in cls(config).named_parameters()}


def _fused_apart(names: set[str]) -> set[str]:
    apart = set()
    for name in names:
        fused = next((fused for fused in FUSED if f".{fused}." in name), None)
        apart |= {name} if fused is None else {name.replace(fused, part) for part in FUSED[fused]}
    return apart
