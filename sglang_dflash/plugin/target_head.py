"""Is the target's head a plain matrix? Read from its config and, where its files are here, their headers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sglang_dflash.drafter.expected import DENSE_DTYPES, PACKED
from sglang_dflash.drafter.tensors import INDEX, read_header
from sglang_dflash.errors import UserError


def is_packed(model: Any) -> bool:
    """True when the head is known to be quantised.

    Args:
        model: SGLang's ``ModelConfig`` of the target. Without its files on this machine only the config
            counts; what it does not say is found when the weights are there (``upstream/bridge.py``).
    """
    quantisation = getattr(model, "hf_quant_config", None) or {}
    if model.quantization == "gguf" or quantisation.get("lm_head") is True:
        return True
    if not quantisation and model.quantization is None:
        return False
    folder = _folder(model.model_path, model.revision)
    if folder is None:
        return False
    heads = _tensors(folder, ".lm_head.") or _tensors(folder, ".embed_tokens.")
    return any(
        name.rpartition(".")[2] in PACKED or (name.endswith(".weight") and dtype not in DENSE_DTYPES)
        for name, dtype in heads.items()
    )


def _folder(path: str, revision: str | None) -> Path | None:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path.count("/") != 1 or folder.exists():
        return None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, revision=revision, local_files_only=True))
    except Exception:
        return None  # not here yet: SGLang fetches it later


def _tensors(folder: Path, part: str) -> dict[str, str]:
    """Name -> dtype of the tensors with ``part`` in their dotted name."""
    index = folder / INDEX
    if index.is_file():
        homes = json.loads(index.read_text())["weight_map"]
        files = sorted({folder / home for name, home in homes.items() if part in f".{name}"})
    else:
        files = sorted(folder.glob("*.safetensors"))
    found: dict[str, str] = {}
    for file in files:
        try:
            entries = read_header(file)
        except (OSError, UserError):
            continue  # SGLang says what is wrong with a target's files
        found |= {name: entry.dtype for name, entry in entries.items() if part in f".{name}"}
    return found
