"""Does a drafter fit its target?"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from sglang_dflash.drafter.config import DrafterConfig, read_config
from sglang_dflash.drafter.expected import DENSE_DTYPES, canonical, packed, passed_over, stored, wanted
from sglang_dflash.drafter.tensors import TensorEntry, read_tensors
from sglang_dflash.errors import UserError
from sglang_dflash.settings import MAX_CANDIDATES

logger = logging.getLogger("sglang_dflash")

#: A vocabulary may be padded to a multiple of 64 to 1024; more than a hundredth is another vocabulary.
PADDING = 0.01
#: Targets that capture a layer's input and not its output: the last layer's is one they have.
INPUT_CAPTURES = frozenset({"muse_glimmer"})


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
    tensors = canonical(read_tensors(folder))
    _check_target(config, target, target_name)
    features = len(_feature_layers(config, target, target_name))
    if config.dflash_config.projector_type == "domino" and config.vocab_size not in (None, target.vocab_size):
        raise UserError(
            f"the Domino drafter was made for a vocabulary of {config.vocab_size}, {target_name} has "
            f"{target.vocab_size}, and its head needs both equal"
        )
    _check_tensors(folder, config, tensors, features)
    return config


def _check_target(config: DrafterConfig, target: Any, target_name: str) -> None:
    dflash = config.dflash_config
    if config.block < 2:
        raise UserError(f"the drafter's block_size is {config.block}; a draft block needs at least 2 rows")
    if config.hidden_size != target.hidden_size:
        raise UserError(
            f"the drafter was made for hidden size {config.hidden_size}, {target_name} has "
            f"{target.hidden_size}; use the drafter trained for this target"
        )
    # Embedding and head are the target's, so a padded vocabulary on either side is no matter.
    off = 0 if config.vocab_size is None else abs(config.vocab_size - target.vocab_size)
    if off > PADDING * target.vocab_size and not _is_reduced(config):
        raise UserError(
            f"the drafter was made for a vocabulary of {config.vocab_size}, {target_name} has "
            f"{target.vocab_size}; use the drafter trained for this target"
        )
    if dflash.selector_rank:
        _check_selector(config, target, target_name)
    if dflash.mask_token_id is not None and not 0 <= dflash.mask_token_id < target.vocab_size:
        raise UserError(
            f"the drafter's mask_token_id {dflash.mask_token_id} is outside {target_name}'s vocabulary "
            f"of {target.vocab_size}"
        )


def _check_selector(config: DrafterConfig, target: Any, target_name: str) -> None:
    """Its tables have a row for every candidate, and it orders no more than the kernels find."""
    rows, top = config.vocab_size or 0, config.dflash_config.selector_top_k
    if rows < target.vocab_size:
        raise UserError(
            f"the drafter's selector has rows for {rows} tokens, {target_name} has {target.vocab_size}; "
            "use the drafter trained for this target"
        )
    if not 1 <= top <= MAX_CANDIDATES:
        raise UserError(
            f"the drafter's selector orders {top} candidates (selector_top_k), the kernels find 1 to "
            f"{MAX_CANDIDATES}; use another drafter"
        )


def _is_reduced(config: DrafterConfig) -> bool:
    """The config counts the drafter's reduced vocabulary under ``vocab_size`` too."""
    return config.draft_vocab_size is not None and config.vocab_size == config.draft_vocab_size


def _feature_layers(config: DrafterConfig, target: Any, target_name: str) -> list[int]:
    """The target layers that the drafter reads.

    Raises UserError for one that SGLang does not capture.
    """
    count = target.num_hidden_layers * int(getattr(target, "num_loops", 1) or 1)
    made_for = config.dflash_config.num_target_layers
    if made_for is not None and made_for != count:
        logger.warning(
            "the drafter's config says that its target has %d layers, %s has %d; going by the target",
            made_for,
            target_name,
            count,
        )
    layers = config.target_layers(count)
    if config.dflash_config.target_layer_ids is None and made_for is None:
        config.target_layers()  # SGLang's class goes by the drafter's own layers, and refuses two or three
    if not layers:
        raise UserError("the drafter's target_layer_ids is empty; a drafter reads at least one target layer")
    limit = count - 1 if getattr(target, "model_type", None) in INPUT_CAPTURES else count - 2
    wrong = [layer for layer in layers if not 0 <= layer <= limit]
    if wrong:
        raise UserError(
            f"the drafter reads target layer {wrong[0]}, but SGLang captures layers 0 to {limit} of "
            f"{target_name} ({count} layers; the last is never captured)"
        )
    if made_for is not None and max(layers) >= made_for:
        raise UserError(
            f"the drafter reads target layer {max(layers)}, but its own config says num_target_layers "
            f"{made_for}, and SGLang refuses that; set num_target_layers to {count}"
        )
    return layers


def _check_tensors(folder: Path, config: DrafterConfig, names: dict[str, TensorEntry], features: int) -> None:
    if not config.quantization_config and not (folder / "hf_quant_config.json").is_file():
        small = packed(names) or next(
            (want.name for want in wanted(config, features) if _is_small(names, want.name)), None
        )
        if small is not None:
            raise UserError(
                f"the drafter's {small} is quantised, but its config.json has no quantization_config; "
                "SGLang would load none of it: fetch the drafter again, or take it in bfloat16"
            )
    for want in wanted(config, features):
        entry, plain = stored(want, names)
        if entry is None:
            raise UserError(_missing(folder, config, names, want.name))
        if plain and want.shape is not None and tuple(entry.shape) != want.shape:
            raise UserError(
                f"the drafter's {want.name} is {entry.shape}, its config ({features} feature layers of "
                f"{config.hidden_size}, {config.num_hidden_layers} layers) needs {list(want.shape)}; config "
                "and weights do not belong together"
            )
    ignored = passed_over(config, names, features)
    domino = [name for name in ignored if name.startswith(("prefix_gru.", "embed_proj."))]
    if domino:
        raise UserError(
            f"the drafter has Domino's tensor {domino[0]}, but its config.json does not say "
            'projector_type "domino"; SGLang refuses it so'
        )
    if ignored:
        logger.warning(
            "SGLang does not load %s of the drafter%s: drafts are made with the target's own embedding and "
            "head, over its whole vocabulary",
            ignored[0],
            f" and {len(ignored) - 1} more tensors" if len(ignored) > 1 else "",
        )


def _is_small(names: dict[str, TensorEntry], name: str) -> bool:
    return name in names and names[name].dtype not in DENSE_DTYPES


def _missing(folder: Path, config: DrafterConfig, names: dict[str, TensorEntry], name: str) -> str:
    layer = name.split(".")[1] if name.startswith("layers.") else None
    if layer is not None and not any(other.startswith(f"layers.{layer}.") for other in names):
        return f"the drafter {folder} has no weights for its layer {layer}; fetch it again"
    if layer is None and not any(other.startswith("layers.") for other in names):
        return f"the drafter {folder} has no tensor {name}; it is not a DFlash checkpoint"
    return f"the drafter {folder} has no tensor {name}; fetch it again"
