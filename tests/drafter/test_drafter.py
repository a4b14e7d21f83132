"""A drafter that does not fit is one line, found in its files before a weight is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_dflash import drafter as module
from sglang_dflash.errors import UserError
from tests import tiny

SPEC = tiny.TargetSpec()


def target_config(**changes: int) -> SimpleNamespace:
    fields = {
        "hidden_size": SPEC.hidden_size,
        "vocab_size": SPEC.vocab_size,
        "num_hidden_layers": SPEC.num_layers,
    }
    return SimpleNamespace(**(fields | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    module.read_config.cache_clear()
    return tiny.build_drafter(tmp_path / "drafter", SPEC)


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)


def check(folder: Path, **changes: int) -> module.DrafterConfig:
    return module.check_fits(folder, target=target_config(**changes), target_name="the-target")


def test_a_fitting_drafter_passes(folder: Path) -> None:
    config = check(folder)
    assert config.block == tiny.DrafterSpec().block_size
    assert config.target_layers() == [0, 2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 128}, "hidden size 64, the-target has 128"),
        ({"vocab_size": 999}, "vocabulary of 512, the-target has 999"),
        ({"num_hidden_layers": 3}, r"target layer 2, but SGLang captures layers 0 to 1 of the-target"),
    ],
)
def test_another_target(folder: Path, changes: dict[str, int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check(folder, **changes)


def test_the_last_layer_is_never_captured(folder: Path) -> None:
    edit_config(folder, dflash_config={"mask_token_id": 259, "target_layer_ids": [0, SPEC.num_layers - 1]})
    with pytest.raises(UserError, match=r"reads target layer 3, but SGLang captures layers 0 to 2"):
        check(folder)


def test_mask_token_outside_the_vocabulary(folder: Path) -> None:
    edit_config(folder, dflash_config={"mask_token_id": 512, "target_layer_ids": [0, 2]})
    with pytest.raises(UserError, match="mask_token_id 512 is outside"):
        check(folder)


def test_block_of_one(folder: Path) -> None:
    edit_config(folder, block_size=1)
    with pytest.raises(UserError, match="block_size is 1"):
        check(folder)


@pytest.mark.parametrize("keep", [0, 5, 400, -1])
def test_truncated_weights(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    with pytest.raises(UserError, match=r"(truncated|not a whole safetensors file).*fetch it again"):
        check(folder)


def test_config_and_weights_of_different_drafters(folder: Path, tmp_path: Path) -> None:
    other = tiny.build_drafter(
        tmp_path / "other", SPEC, replace(tiny.DrafterSpec(), target_layer_ids=(0, 1, 2))
    )
    (other / "model.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(UserError, match="config and weights do not belong together"):
        check(folder)


def test_missing_tensor_and_layer(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.pop("fc.weight"))
    with pytest.raises(UserError, match=r"no tensor fc\.weight"):
        check(folder)


def test_missing_layer(folder: Path) -> None:
    def drop(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if name.startswith("layers.1.")]:
            del weights[name]

    edit_weights(folder, drop)
    with pytest.raises(UserError, match="no weights for its layer 1"):
        check(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"hidden_size": "wide"}'])
def test_unreadable_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match="not a DFlash checkpoint"):
        check(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no drafter at .*give an existing folder"):
        module.resolve_folder(str(tmp_path / "nowhere"))


def test_a_pinned_revision_is_found_without_the_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit's hash that the cache holds, although no branch or tag in it points there."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    pinned = tiny.cached_snapshot(tmp_path, "org/drafter", "a" * 40, folder)
    module.resolve_folder.cache_clear()
    assert module.resolve_folder("org/drafter", "a" * 40) == pinned
    with pytest.raises(UserError, match=f"model hub at revision '{'b' * 40}'"):
        module.resolve_folder("org/drafter", "b" * 40)
    main = tiny.cached_snapshot(tmp_path, "org/drafter", "b" * 40, folder, ref="main")
    assert module.resolve_folder("org/drafter", None) == module.resolve_folder("org/drafter", "main") == main


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="no safetensors file"):
        check(folder)
