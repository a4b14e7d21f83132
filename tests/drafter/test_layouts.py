"""The layouts drafters come in, read as SGLang reads them: served, or one line that says what is wrong."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_dflash import drafter as module
from sglang_dflash.errors import UserError
from tests import tiny
from tests.drafter.test_drafter import SPEC, check, edit_config, edit_weights

NESTED = {"mask_token_id": tiny.MASK_ID, "target_layer_ids": [0, 2]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    module.read_config.cache_clear()
    return tiny.build_drafter(tmp_path / "drafter", SPEC)


def flatten(folder: Path, **changes: object) -> None:
    """All of ``dflash_config`` at the top level, as some exports write it."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    section = config.pop("dflash_config")
    file.write_text(json.dumps({**config, **section, **changes}))


def drop(folder: Path, *names: str) -> None:
    edit_weights(folder, lambda weights: [weights.pop(name) for name in names])


def shard(folder: Path) -> dict[str, str]:
    """The drafter in two files with an index; returns tensor name -> file name."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    homes = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for home in set(homes.values()):
        save_file({name: weights[name] for name in names if homes[name] == home}, folder / home)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    return homes


# -- keys at the top level ------------------------------------------------------


def test_keys_at_the_top_level_are_read(folder: Path) -> None:
    flatten(folder, block_size=7)
    config = check(folder)
    assert (config.block, config.target_layers(), config.dflash_config.mask_token_id) == (7, [0, 2], 259)


def test_the_nested_key_wins_even_when_it_is_null(folder: Path) -> None:
    edit_config(folder, block_size=8, dflash_config={**NESTED, "block_size": 5}, mask_token_id=999999)
    assert check(folder).block == 5
    module.read_config.cache_clear()
    edit_config(folder, block_size=8, dflash_config={**NESTED, "block_size": None})
    assert check(folder).block == 16


def test_a_block_size_only_in_the_section(folder: Path) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    del config["block_size"]
    config["dflash_config"]["block_size"] = 12
    file.write_text(json.dumps(config))
    assert check(folder).block == 12


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask_token_id": 999999}, "mask_token_id 999999 is outside"),
        ({"projector_type": "domino"}, r"no tensor prefix_gru\.weight_ih_l0"),
        ({"target_layer_ids": [0, 3]}, "reads target layer 3"),
        ({"target_layer_ids": []}, "target_layer_ids is empty"),
        ({"block_size": 1}, "block_size is 1"),
    ],
)
def test_faults_at_the_top_level_are_named(folder: Path, changes: dict[str, Any], words: str) -> None:
    flatten(folder, **changes)
    with pytest.raises(UserError, match=words):
        check(folder)


@pytest.mark.parametrize("name", ["query_zero_predicts_next", "sample_from_anchor"])
@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_drafts_that_stand_one_place_earlier(folder: Path, name: str, value: bool, nested: bool) -> None:
    edit_config(folder, **({"dflash_config": {**NESTED, name: value}} if nested else {name: value}))
    assert check(folder).anchor_first is value


# -- tensors --------------------------------------------------------------------

MLP = tuple(f"layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("layers.0.self_attn.q_proj.weight",), r"no tensor layers\.0\.self_attn\.q_proj\.weight"),
        (("layers.1.self_attn.k_norm.weight",), r"no tensor layers\.1\.self_attn\.k_norm\.weight"),
        (("layers.1.input_layernorm.weight",), r"no tensor layers\.1\.input_layernorm\.weight"),
        (MLP, r"no tensor layers\.1\.mlp\.gate_proj\.weight"),
        (("hidden_norm.weight",), r"no tensor hidden_norm\.weight"),
    ],
)
def test_a_missing_tensor_is_named(folder: Path, names: tuple[str, ...], words: str) -> None:
    drop(folder, *names)
    with pytest.raises(UserError, match=words):
        check(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_bias": True}, r"no tensor layers\.0\.self_attn\.q_proj\.bias"),
        (
            {"dflash_config": {**NESTED, "attention_sink_bias": True}},
            r"no tensor layers\.0\.self_attn\.attention_sink_bias",
        ),
        (
            {"dflash_config": {**NESTED, "selector_rank": 4, "selector_top_k": 2}},
            r"no tensor candidate_selector\.predecessor_codebook",
        ),
        (
            {"dflash_config": {**NESTED, "conv_kernel_size": 2, "conv_group_size": 16}},
            r"no tensor layers\.0\.attention_conv\.base_kernel",
        ),
        ({"architectures": ["DFlashLagunaForCausalLM"]}, r"no tensor aux_hidden_norms\.0\.weight"),
        ({"num_attention_heads": 8}, r"q_proj\.weight is \[64, 64\], .* needs \[128, 64\]"),
        ({"intermediate_size": 96}, r"gate_proj\.weight is \[128, 64\], .* needs \[96, 64\]"),
        ({"num_hidden_layers": 3}, "no weights for its layer 2"),
    ],
)
def test_what_the_config_promises_must_be_there(folder: Path, changes: dict[str, Any], words: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=words):
        check(folder)


def test_other_names_that_sglang_knows(folder: Path) -> None:
    def rename(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            new = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
            weights[new.get(name, f"model.{name}")] = weights.pop(name)

    edit_weights(folder, rename)
    edit_config(folder, architectures=["MuseGlimmerAssistantModel"])
    check(folder)


def test_fused_projections_count_as_their_parts(folder: Path) -> None:
    def fuse(weights: dict[str, torch.Tensor]) -> None:
        for layer in range(2):
            at = f"layers.{layer}."
            for whole, parts in (("self_attn.qkv", "qkv"), ("mlp.gate_up", ("gate", "up"))):
                group = whole.split(".")[0]
                names = [f"{at}{group}.{part}_proj.weight" for part in parts]
                weights[f"{at}{whole}_proj.weight"] = torch.cat([weights.pop(name) for name in names])

    edit_weights(folder, fuse)
    check(folder)


def test_a_sharded_drafter_is_read_by_its_index(folder: Path) -> None:
    shard(folder)
    (folder / "of-another-export.safetensors").write_bytes(b"not a tensor file")
    check(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"model-00002-of-00002\.safetensors is missing, .*index\.json names it"
    ):
        check(folder)


def test_a_tensor_that_is_not_where_the_index_says(folder: Path) -> None:
    homes = shard(folder)
    name = next(name for name, home in homes.items() if "00001" in home)
    file = folder / homes[name]
    weights = load_file(file)
    del weights[name]
    save_file(weights, file)
    with pytest.raises(UserError, match=f"has no tensor {name}, which model.safetensors.index.json places"):
        check(folder)


def test_a_damaged_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match=r"index\.json is not an index"):
        check(folder)


def pack(folder: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        for layer in range(2):
            name = f"layers.{layer}.mlp.down_proj.weight"
            weights[f"{name}_packed"] = weights.pop(name).to(torch.int32)

    edit_weights(folder, change)


def test_packed_weights_need_their_quantization_config(folder: Path) -> None:
    pack(folder)
    with pytest.raises(
        UserError, match=r"down_proj\.weight_packed is quantised, but its config\.json has no"
    ):
        check(folder)
    module.read_config.cache_clear()
    edit_config(folder, quantization_config={"quant_method": "compressed-tensors"})
    assert check(folder).quantization_config


def test_eight_bit_weights_without_scales(folder: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        name = "layers.0.self_attn.o_proj.weight"
        weights[name] = weights[name].to(torch.float8_e4m3fn)

    edit_weights(folder, change)
    with pytest.raises(UserError, match=r"o_proj\.weight is quantised"):
        check(folder)


# -- vocabularies and targets ---------------------------------------------------


def test_a_reduced_vocabulary_is_drafted_over_the_whole_one(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The reduced head holds rows of the target's, so the target's head drafts a superset."""
    edit_config(folder, draft_vocab_size=100)
    edit_weights(
        folder,
        lambda weights: weights.update(
            {"d2t": torch.zeros(100, dtype=torch.int64), "lm_head.weight": torch.zeros(100, 64)}
        ),
    )
    with caplog.at_level(logging.WARNING):
        check(folder)
    assert "does not load d2t of the drafter and 1 more tensors" in caplog.text


def test_a_padded_vocabulary_is_no_other_vocabulary(folder: Path) -> None:
    edit_config(folder, vocab_size=49280)
    check(folder, vocab_size=49152)
    with pytest.raises(UserError, match="vocabulary of 49280, the-target has 32000"):
        check(folder, vocab_size=32000)


def test_the_targets_layer_count_is_only_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_config(folder, num_target_layers=5)
    with caplog.at_level(logging.WARNING):
        check(folder)
    assert "says that its target has 5 layers, the-target has 4" in caplog.text
    module.read_config.cache_clear()
    edit_config(folder, num_target_layers=2)
    with pytest.raises(UserError, match="set num_target_layers to 4"):
        check(folder)


# -- other kinds ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["DSparkDraftModel"]}, "a drafter for DSPARK .*--speculative-algorithm DSPARK"),
        ({"architectures": ["Qwen3DSparkModel"]}, "--speculative-algorithm DSPARK"),
        ({"markov_rank": 256}, "--speculative-algorithm DSPARK"),
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "--speculative-algorithm EAGLE3"),
        ({"architectures": ["LlamaForCausalLMEagle"]}, "--speculative-algorithm EAGLE"),
        ({"architectures": ["LlamaForCausalLM"]}, "is a LlamaForCausalLM, not a DFlash checkpoint"),
        ({"architectures": None}, "names no class under architectures"),
    ],
)
def test_another_kind_of_model_is_named(folder: Path, changes: dict[str, Any], words: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=words):
        check(folder)


def test_a_class_of_ones_own_is_let_through(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_config(folder, architectures=["MyDraftModel"])
    monkeypatch.setenv("SGLANG_EXTERNAL_MODEL_PACKAGE", "mine")
    check(folder)


def test_a_folder_of_speculators_says_how_to_convert(folder: Path) -> None:
    file = folder / "config.json"
    layer = json.loads(file.read_text())
    written = {
        "speculators_model_type": "dflash",
        "architectures": ["DFlashSpeculator"],
        "block_size": 8,
        "mask_token_id": 259,
        "aux_hidden_state_layer_ids": [1, 3],
        "transformer_layer_config": {
            k: v for k, v in layer.items() if k not in ("dflash_config", "architectures")
        },
    }
    file.write_text(json.dumps(written))
    with pytest.raises(UserError, match="layout of the speculators library") as caught:
        check(folder)
    # What the line says to write is a drafter that is served.
    said = str(caught.value)
    section = json.loads(said[said.index('{"block_size"') : said.index("}") + 1])
    assert section == {"block_size": 8, "mask_token_id": 259, "target_layer_ids": [0, 2]}
    module.read_config.cache_clear()
    converted = {
        **written["transformer_layer_config"],
        "architectures": ["DFlashDraftModel"],
        "dflash_config": section,
    }
    file.write_text(json.dumps(converted))
    assert check(folder).target_layers() == [0, 2]


# -- the hub's cache ------------------------------------------------------------


def test_a_pinned_revision_comes_from_the_hubs_cache(tmp_path: Path) -> None:
    """Two snapshots in the cache, no network, and no ``main`` among them."""
    home = tmp_path / "hub" / "models--org--drafter"
    blocks = {"a" * 40: 6, "b" * 40: 7}
    for sha, block in blocks.items():
        edit_config(tiny.build_drafter(home / "snapshots" / sha, SPEC), block_size=block)
    (home / "refs").mkdir()
    (home / "refs" / "v2").write_text("b" * 40)
    code = (
        "import sys; from sglang_dflash.drafter import read_config, resolve_folder\n"
        "for name in sys.argv[1:]: print(read_config(resolve_folder('org/drafter', name)).block)"
    )

    def blocks_of(*revisions: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, *revisions],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        )

    assert blocks_of(*blocks, "v2").stdout.split() == ["6", "7", "7"]
    assert "reachable on the model hub at revision 'v3'" in blocks_of("v3").stderr
