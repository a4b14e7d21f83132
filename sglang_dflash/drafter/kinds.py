"""Which kind of drafter a ``config.json`` is of: those SGLang's DFLASH loads, and a word for the others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_dflash.errors import UserError

#: The model classes that SGLang 0.5.23 serves under ``--speculative-algorithm DFLASH``
#: (``models/dflash.py`` and ``models/lilicorr.py``, their ``EntryClass``).
DFLASH_CLASSES = frozenset(
    {
        "DFlashDraftModel",
        "DFlashLagunaForCausalLM",
        "MuseGlimmerAssistantModel",
        "DFlash2DraftModel",
        "DFlash2BeamDraftModel",
        "MiniMaxDFlash2DraftModel",
        "LiLiCorrDraftModel",
    }
)
#: A part of a class's name, in lower case -> the algorithm it is for.
_ALGORITHMS = (("dspark", "DSPARK"), ("eagle3", "EAGLE3"), ("eagle", "EAGLE"), ("nextn", "NEXTN"))


def check_kind(raw: Mapping[str, Any], folder: Path, *, foreign_classes: bool = False) -> None:
    """Check that a config is of a drafter that SGLang serves under DFLASH.

    Args:
        raw: ``config.json``.
        folder: how messages name the drafter.
        foreign_classes: SGLang loads model classes that are not its own (SGLANG_EXTERNAL_MODEL_PACKAGE).

    Raises:
        UserError: one line with what it is and how to use it.
    """
    if raw.get("speculators_model_type") or "transformer_layer_config" in raw:
        raise UserError(_speculators(raw, folder))
    named = [str(name) for name in raw.get("architectures") or []]
    for name in named:
        for part, algorithm in _ALGORITHMS:
            if part in name.lower():
                raise UserError(
                    f"{folder} is a drafter for {algorithm} ({name}), not for DFLASH; start it with "
                    f"--speculative-algorithm {algorithm}"
                )
    if raw.get("markov_rank"):
        raise UserError(
            f"{folder} has a Markov head (markov_rank {raw['markov_rank']}), so it is a DSpark drafter; "
            "start it with --speculative-algorithm DSPARK"
        )
    if DFLASH_CLASSES.intersection(named) or foreign_classes:
        return
    what = f"is a {named[0]}" if named else "names no class under architectures in its config.json"
    raise UserError(
        f"{folder} {what}, not a DFlash checkpoint: SGLang loads {', '.join(sorted(DFLASH_CLASSES))}; "
        "point --speculative-draft-model-path at a drafter"
    )


def _speculators(raw: Mapping[str, Any], folder: Path) -> str:
    """How to convert a folder of the ``speculators`` library, whose layer numbers count hidden states."""
    kind = raw.get("speculators_model_type") or "dflash"
    where = f"{folder} is in the layout of the speculators library"
    if kind != "dflash":
        return f"{where} ({kind}), which SGLang's DFLASH does not read; see docs/drafters.md"
    layers = [int(layer) - 1 for layer in raw.get("aux_hidden_state_layer_ids") or []]
    return (
        f"{where}, which SGLang does not read; its tensors fit as they are: write a config.json with the "
        "keys of transformer_layer_config at the top, "
        '"architectures": ["DFlashDraftModel"] and '
        f'"dflash_config": {{"block_size": {raw.get("block_size")}, '
        f'"mask_token_id": {raw.get("mask_token_id")}, "target_layer_ids": {layers}}} (docs/drafters.md)'
    )
