"""Does a drafter fit its target?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sglang_dflash.drafter.config import DrafterConfig, read_config
from sglang_dflash.drafter.tensors import TensorEntry, read_tensors
from sglang_dflash.errors import UserError


def check_fits(folder: Path, *, target: Any, target_name: str) -> DrafterConfig:
    """Check a drafter against its target's text config.

    Args:
        folder: the drafter's folder.
        target: the target's Hugging Face text config (hidden_size, vocab_size, num_hidden_layers).
        target_name: how messages name the target.

    Raises:
        UserError: one line naming what does not fit.
    """
    config = read_config(folder)
    tensors = read_tensors(folder)
    dflash = config.dflash_config
    if config.block < 2:
        raise UserError(f"the drafter's block_size is {config.block}; a draft block needs at least 2 rows")
    if config.hidden_size != target.hidden_size:
        raise UserError(
            f"the drafter was made for hidden size {config.hidden_size}, {target_name} has "
            f"{target.hidden_size}; use the drafter trained for this target"
        )
    if config.vocab_size is not None and config.vocab_size != target.vocab_size:
        raise UserError(
            f"the drafter was made for a vocabulary of {config.vocab_size}, {target_name} has "
            f"{target.vocab_size}; use the drafter trained for this target"
        )
    if dflash.mask_token_id is not None and not 0 <= dflash.mask_token_id < target.vocab_size:
        raise UserError(
            f"the drafter's mask_token_id {dflash.mask_token_id} is outside {target_name}'s vocabulary "
            f"of {target.vocab_size}"
        )
    made_for = dflash.num_target_layers or config.num_target_layers
    if made_for is not None and made_for != target.num_hidden_layers:
        raise UserError(
            f"the drafter was made for a target of {made_for} layers, {target_name} has "
            f"{target.num_hidden_layers}; use the drafter trained for this target"
        )
    layers = config.target_layers()
    limit = target.num_hidden_layers - 2
    wrong = [layer for layer in layers if not 0 <= layer <= limit]
    if wrong:
        raise UserError(
            f"the drafter reads target layer {wrong[0]}, but SGLang captures layers 0 to {limit} of "
            f"{target_name} ({target.num_hidden_layers} layers; the last is never captured)"
        )
    _check_shapes(folder, config, tensors, len(layers))
    return config


def _check_shapes(
    folder: Path, config: DrafterConfig, tensors: dict[str, TensorEntry], num_features: int
) -> None:
    names = {name.removeprefix("model."): entry for name, entry in tensors.items()}
    hidden = config.hidden_size
    expected = {
        "fc.weight": [hidden, num_features * hidden],
        "hidden_norm.weight": [hidden],
        "norm.weight": [hidden],
    }
    for name, shape in expected.items():
        if name not in names:
            raise UserError(f"the drafter {folder} has no tensor {name}; it is not a DFlash checkpoint")
        if names[name].shape != shape:
            raise UserError(
                f"the drafter's {name} is {names[name].shape}, its config ({num_features} feature layers of "
                f"{hidden}) needs {shape}; config and weights do not belong together"
            )
    for layer in range(config.num_hidden_layers):
        if not any(name.startswith(f"layers.{layer}.") for name in names):
            raise UserError(f"the drafter {folder} has no weights for its layer {layer}; fetch it again")
